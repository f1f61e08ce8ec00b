"""A copy of a model that one rank may run by itself, whatever its layers do."""

import copy
from collections import OrderedDict

from torch import nn

from syncbn import revert_sync_batchnorm


def lone_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose BatchNorm layers never exchange, in any mode, and that nothing of the run listens to.

    In evaluation mode it gives what ``model`` gives, to the last bit; in training its layers normalize by this rank's
    batch alone. Hooks stay behind: whoever watches the run would take what the copy does for a step.
    Cost: a copy of all parameters and buffers; no exchange.
    """
    hooks = [h for module in model.modules() for h in (module._forward_hooks, module._forward_pre_hooks)]
    return revert_sync_batchnorm(copy.deepcopy(model, {id(of_module): OrderedDict() for of_module in hooks}))
