"""The training service: takes jobs over REST, has Ray run them, reports convergence and statistic drift."""
