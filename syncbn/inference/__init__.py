"""Fold BatchNorm into the layer before it, so that a deployed model does not compute it at all.

In evaluation BatchNorm is one affine map per channel (Ioffe and Szegedy 2015, Algorithm 2, line 11), and an affine map
behind a linear or convolution layer is the same layer with other weights.
"""

from syncbn.inference.fold import fold_batchnorm
from syncbn.inference.plan import FoldingPlan, plan_folding

__all__ = ["FoldingPlan", "fold_batchnorm", "plan_folding"]
