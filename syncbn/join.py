"""Ranks with unequal numbers of batches: who has run out answers the others with empty batches until all are done."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.algorithms.join import Join, Joinable, JoinHook
from torch.nn.parallel import DistributedDataParallel


class JoinableModel(Joinable):
    """A model to train inside torch's `Join` with SyncBatchNorm layers, also in DistributedDataParallel.

    A rank whose batches are used up goes on to run ``model`` forward and backward on ``empty_batch`` for each batch
    that some other rank still has. An empty batch adds nothing to any statistic, and its gradients are zero; what
    the model exchanges on the way, in its layers and in DistributedDataParallel, is in the right order because it is
    the same model that runs. Buffers of all ranks stay the same bits, and each step is that of one process with the
    batches that there still are::

        joinable = JoinableModel(model, (images[:0],), after_backward=optimizer.step)
        with Join([joinable]):
            for images, labels in batches:
                optimizer.zero_grad()
                loss(joinable(images), labels).backward()
                optimizer.step()

    Pass it to `Join` in place of the wrapped model, whose own hook knows nothing of exchanges within its layers.
    DistributedDataParallel divides by the number of all ranks throughout, also by those that have run out.

    Cost: two all-reduces of at most 2 values a batch, and one forward and backward of nothing on ranks that ran out.
    Limits: every module must take a batch of no samples, and every BatchNorm that trains must be synchronized (a
        local one makes NaN of nothing). Each call is followed by its backward before the next call, unless gradients
        are disabled around it. The mode is the same on all ranks throughout the block; to evaluate inside it, call
        the plain module, without wrapper, which then exchanges nothing. What a loop exchanges outside ``model`` is
        not answered, unless by ``after_backward``. A rank that raises inside the block leaves the others waiting
        for it until their process group's timeout.

    Args:
        model: called as is, on whatever the object is called with.
        empty_batch: the positional arguments of ``model`` for a batch of no samples, of the type, device and
            trailing shape of a real one; a rank that never has any batch needs it too.
        after_backward: what the training loop does after a backward that synchronized gradients, optimizer and all.
            With it, parameters and optimizers of ranks that ran out keep step with the others. Without, they stand
            still, and parameters and buffers are copied from a rank that was among the last when all are done;
            the optimizer's own state is not.
        process_group: that of the model; None for the default group.
        device: where the exchanges of `Join` itself take place; None for that of the model's first parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        empty_batch: tuple[Any, ...],
        *,
        after_backward: Callable[[], object] | None = None,
        process_group: ProcessGroup | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self._empty_batch = empty_batch
        self._after_backward = after_backward
        self._process_group = process_group
        self._device = device
        self._gradients_are_stale = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the model; inside `Join`, ranks that have run out are told to answer."""
        Join.notify_join_context(self)
        if self._join_config.enable:
            backward, synchronizes = torch.is_grad_enabled(), _synchronizes(self.model)
            self._tell_wanted(backward, synchronizes)
            self._note(backward, synchronizes)
        return self.model(*args, **kwargs)

    def join_hook(self, **_: Any) -> JoinHook:
        """What `Join` calls where batches are used up."""
        return _AnswerEmpty(self)

    @property
    def join_device(self) -> torch.device:
        """Where `Join` makes its own tensors."""
        if self._device is None:
            self._device = next(self.model.parameters()).device
        return self._device

    @property
    def join_process_group(self) -> ProcessGroup:
        """Among which ranks `Join` works."""
        group = self._process_group if self._process_group is not None else dist.group.WORLD
        assert group is not None
        return group

    def answer_empty(self) -> None:
        """Take part in one batch of the other ranks."""
        backward, synchronizes = (bool(flag) for flag in self._tell_wanted(False, False).tolist())
        if self._gradients_are_stale:  # else this rank ran out amid an accumulation, and its share is in them
            self.model.zero_grad(set_to_none=True)
        with _synchronization(self.model, synchronizes):
            with torch.set_grad_enabled(backward):
                output = self.model(*self._empty_batch)
            if backward:
                _backward_of_nothing(output)
        self._note(backward, synchronizes)
        if backward and synchronizes and self._after_backward is not None:
            self._after_backward()

    def copy_from_last(self, is_last_joiner: bool) -> None:
        """Give every rank the parameters and buffers of one that was among the last."""
        if self._after_backward is not None:
            return
        rank = dist.get_rank(self.join_process_group) if is_last_joiner else -1
        source = torch.tensor(rank, device=self.join_device)
        dist.all_reduce(source, op=dist.ReduceOp.MAX, group=self.join_process_group)
        with torch.no_grad():
            tensors = [*self.model.parameters(), *self.model.buffers()]
            for tensor in tensors:
                dist.broadcast(tensor, group=self.join_process_group, group_src=int(source.item()))

    def _tell_wanted(self, backward: bool, synchronizes: bool) -> Tensor:
        """Whether any rank with a batch wants a backward, and gradients synchronized in it; all ranks must call."""
        wanted = torch.tensor([backward, synchronizes], dtype=torch.float32, device=self.join_device)
        dist.all_reduce(wanted, op=dist.ReduceOp.MAX, group=self.join_process_group)
        return wanted

    def _note(self, backward: bool, synchronizes: bool) -> None:
        if backward:
            self._gradients_are_stale = synchronizes


class _AnswerEmpty(JoinHook):
    def __init__(self, joinable: JoinableModel) -> None:
        self._joinable = joinable

    def main_hook(self) -> None:
        self._joinable.answer_empty()

    def post_hook(self, is_last_joiner: bool) -> None:
        self._joinable.copy_from_last(is_last_joiner)


def _synchronizes(model: nn.Module) -> bool:
    """Whether the next backward exchanges gradients: not in DistributedDataParallel's ``no_sync``."""
    return bool(getattr(model, "require_backward_grad_sync", True))


def _synchronization(model: nn.Module, wanted: bool) -> AbstractContextManager[Any]:
    if wanted or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()


def _backward_of_nothing(output: Any) -> None:
    """Backward with a zero gradient, which reaches whatever a gradient would."""
    terms = [(tensor * 0).sum() for tensor in _tensors(output) if tensor.requires_grad]
    torch.autograd.backward(terms)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)
