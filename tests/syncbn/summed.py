"""A sum over ranks that autograd knows, for what the tests compose themselves."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def summed(values: Tensor) -> Tensor:
    """The sum of ``values`` over all ranks; its gradient is the sum of theirs, to any order."""
    total: Tensor = _Summed.apply(values)  # type: ignore[no-untyped-call]
    return total


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return summed(grad)
