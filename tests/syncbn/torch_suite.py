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

import pytest
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
"""Why the others do not run; `test_public_suites` has what they check."""


def check_inputs_of_torchs_module_tests() -> list[str]:
    """Whatever torch's tests of modules feed BatchNorm1d to 3d with, in halves on two ranks and whole to torch's.

    From ``torch.testing._internal.common_modules``. Raises AssertionError where ranks and torch differ by more than
    1e-10, or where torch refuses and ours does not. Returns what was checked.
    """
    checked: list[str] = []
    for info in _batchnorm_modules():
        for training in (True, False):
            torch.manual_seed(1234)  # the same inputs on all ranks
            settings = {"device": "cpu", "dtype": torch.float64, "requires_grad": False, "training": training}
            for given in info.module_inputs_func(info, **settings):
                _check_input(info.module_cls, given, training)
                checked.append(f"{info.name} {given.desc or 'plain'} {'training' if training else 'evaluation'}")
        for refused in info.module_error_inputs_func(info, **settings | {"training": True}):
            _check_refusal(refused)
            checked.append(f"{info.name} {refused.error_regex}")
    return checked


def _batchnorm_modules() -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_modules import module_db
    return [info for info in module_db if info.module_cls in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)]


def _check_input(kind: type[nn.Module], given: Any, training: bool) -> None:
    build, (whole, *_) = given.constructor_input, given.forward_input.args
    theirs = kind(*build.args, **build.kwargs).double().train(training)
    ours = SyncBatchNorm(*build.args, **build.kwargs).double().train(training)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    rows = torch.tensor_split(torch.arange(len(whole)), 2)[dist.get_rank()]
    by_batch = training or theirs.running_mean is None
    if by_batch and not training:  # then without statistics of its own, and each rank by its own batch
        whole, rows = whole[rows], torch.arange(len(rows))
    part = whole[rows].requires_grad_()
    whole = whole.clone().requires_grad_()
    expected, output = theirs(whole), ours(part)
    torch.autograd.backward(expected.cos().sum())
    torch.autograd.backward(output.cos().sum())
    assert whole.grad is not None
    torch.testing.assert_close(output, expected[rows], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(part.grad, whole.grad[rows], rtol=1e-10, atol=1e-10)
    for name, buffer in theirs.named_buffers() if len(whole) else ():  # of nothing, torch's counts a batch
        torch.testing.assert_close(ours.get_buffer(name), buffer, rtol=1e-10, atol=1e-10)


def _check_refusal(refused: Any) -> None:
    build, forward = refused.module_error_input.constructor_input, refused.module_error_input.forward_input
    layer = SyncBatchNorm(*build.args, **build.kwargs).double()
    with pytest.raises(refused.error_type, match=refused.error_regex):
        layer(*forward.args)


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
