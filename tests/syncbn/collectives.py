"""Counting collectives as they pass torch's dispatcher, so that what is counted is what is sent."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed import get_world_size
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Collective:
    """One collective of this rank: its operator, and how many values of which type go to each rank.

    The number that opens a message is not counted; a message of nothing else has 0 values.
    """

    operator: str
    num_values: int
    dtype: str


class CollectiveLog(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, every collective that this thread starts is in ``collectives``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.collectives: list[Collective] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self.collectives.append(_describe(func, args))
        operator: Callable[..., Any] = func
        return operator(*args, **(kwargs or {}))


def _describe(func: Any, args: tuple[Any, ...]) -> Collective:
    name = func._schema.name.removeprefix("c10d::")
    if name == "alltoall_base_":
        sent: Tensor = args[1]
        return Collective(name, sent.numel() // (get_world_size() - 1) - 1, _dtype(sent))
    tensor = _first_tensor(args)
    return Collective(name, tensor.numel(), _dtype(tensor))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _first_tensor(args: Any) -> Tensor:
    for arg in args:
        if isinstance(arg, Tensor):
            return arg
        if isinstance(arg, list | tuple) and arg:
            return _first_tensor(arg)
    raise ValueError("a collective without a tensor")
