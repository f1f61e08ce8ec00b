"""Torch's own tests of its SyncBatchNorm, as they ship in the wheel, run on ours over gloo on the CPU.

They are written for ``torch.nn.SyncBatchNorm`` and for GPUs. Everything that is put in the place of something of
torch's is put there by `run_on_rank`, in a process that is made for it and ends after it: our class for torch's;
the CPU for every GPU that a test asks for; DistributedDataParallel without ``device_ids``, which a module on the CPU
must not have. Nothing of ours is changed, and no file of torch's.
"""

import inspect
import os
import random
import traceback
import unittest
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from syncbn import SyncBatchNorm

PASSING = (
    "test_DistributedDataParallel_SyncBatchNorm",
    "test_DistributedDataParallel_SyncBatchNorm_2D_Input",
    "test_DistributedDataParallel_SyncBatchNorm_Channels_Last",
    "test_DistributedDataParallel_SyncBatchNorm_Diff_Input_Sizes_Running_Value",
    "test_DistributedDataParallel_SyncBatchNorm_Diff_Input_Sizes_gradient",
    "test_DistributedDataParallel_SyncBatchNorm_No_Affine",
    "test_DistributedDataParallel_SyncBatchNorm_Single_Input_Per_Process",
    "test_DistributedDataParallel_SyncBatchNorm_half",
    "test_ddp_inference",
    "test_ddp_uneven_inputs_stop_iteration_sync_bn",
    "test_sync_bn_logged",
)
"""Every test of the suite that is about the layer, less those of `LEFT_OUT`."""

LEFT_OUT = {
    "test_SyncBatchNorm_process_group": "takes its model from torchvision",
    "test_ddp_sync_bn_training_vs_eval": "is skipped by torch itself, and looks for an all_gather, which ours has not",
}
"""Why the others do not run."""


class OnCpu(TorchFunctionMode):
    """Whatever is to be made on a GPU, or moved to one, is on the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return torch.device("cpu")
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs.get("device") is not None:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class WrapperOnCpu(DistributedDataParallel):
    """DistributedDataParallel that leaves its module where it is."""

    def __init__(self, module: nn.Module, device_ids: object = None, **options: Any) -> None:
        super().__init__(module, **options)


class Unsynchronized(SyncBatchNorm):
    """Ours, less what it is for."""

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        return nn.BatchNorm2d.forward(self, input)


def run_on_rank(names: tuple[str, ...], layer: type[nn.Module] = SyncBatchNorm) -> dict[str, str | None]:
    """By test, None if it passed on this rank with ``layer``, else what it failed of. Changes this process for good."""
    os.environ |= {"BACKEND": "gloo", "WORLD_SIZE": str(dist.get_world_size())}
    nn.SyncBatchNorm = layer  # type: ignore[misc, assignment]
    nn.parallel.DistributedDataParallel = WrapperOnCpu  # type: ignore[misc, assignment]
    torch.cuda.set_device = lambda device: None
    torch.cuda.current_device = lambda: 0
    with warnings.catch_warnings(), OnCpu():
        warnings.simplefilter("ignore")  # torch's tests use what torch has deprecated
        return {name: _run(name) for name in names}


def _run(name: str) -> str | None:
    from torch.testing._internal.common_utils import TestCase
    from torch.testing._internal.distributed.distributed_test import DistributedTest

    class Suite(DistributedTest._DistTestBase, TestCase):
        rank = dist.get_rank()
        world_size = dist.get_world_size()

        def _barrier(self, *_: Any, **__: Any) -> None:
            dist.barrier()

    suite = Suite(name)  # type: ignore[no-untyped-call]
    torch.manual_seed(1234)
    random.seed(1234)
    test = inspect.unwrap(getattr(Suite, name))  # less the decorators that skip without GPUs
    try:
        test(suite)
    except (Exception, unittest.SkipTest):
        return traceback.format_exc()
    return None
