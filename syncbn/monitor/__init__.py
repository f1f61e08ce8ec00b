"""Watching the BatchNorm layers of a model while it trains: a sample of all ranks every so many steps."""

from syncbn.monitor.doctor import RankDoctor
from syncbn.monitor.finding import RankFinding, RankQuantity
from syncbn.monitor.monitor import BatchNormMonitor
from syncbn.monitor.sample import BatchNormSample, LayerSample

__all__ = ["BatchNormMonitor", "BatchNormSample", "LayerSample", "RankDoctor", "RankFinding", "RankQuantity"]
