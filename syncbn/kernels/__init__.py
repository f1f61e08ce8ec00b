"""What one rank computes alone: statistics, normalization and their gradients, without a collective."""
