"""Giving layers their paths as names, which errors and the ranks' agreement speak of."""

from torch import nn

from syncbn.batchnorm import SyncBatchNorm
from syncbn.layers import unwrapped


def name_layers(model: nn.Module) -> nn.Module:
    """Name every SyncBatchNorm of ``model`` by its path in it; returns ``model``.

    `convert_sync_batchnorm` does it too: call this for layers that were built as SyncBatchNorm. Ranks whose layers
    have names are held to the same order of layers, also where sizes are equal. All ranks must name alike. A layer
    that stands in several places is named by its first; `DistributedDataParallel` adds nothing to the path.
    """
    for path, module in unwrapped(model).named_modules():
        if isinstance(module, SyncBatchNorm):
            module.layer_name = path
    return model
