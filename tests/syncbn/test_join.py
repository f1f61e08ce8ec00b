"""Ranks with unequal numbers of batches: all finish, and every step is that of one process with what there was."""

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from syncbn import JoinableModel, SyncBatchNorm, convert_sync_batchnorm
from tests.ranks import run_ranks

Batch = tuple[Tensor, Tensor]
EMPTY = (torch.empty(0, 2, 6, 6, dtype=torch.float64),)
TOLERANCE = 1e-10


def _model() -> nn.Module:
    torch.manual_seed(11)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 8, bias=False),
        nn.BatchNorm1d(8, momentum=None),
        nn.ReLU(),
        nn.Linear(8, 3),
    ).double()


def _batches(rank: int, num_batches: int) -> list[Batch]:
    """Each rank's own, of unequal sizes."""
    generator = torch.Generator().manual_seed(100 + rank)
    sizes = [2 + (rank + step) % 3 for step in range(num_batches)]
    return [
        (torch.randn(n, 2, 6, 6, generator=generator, dtype=torch.float64), torch.randint(3, (n,), generator=generator))
        for n in sizes
    ]


def _loss(output: Tensor, labels: Tensor) -> Tensor:
    """Summed, so that no rank needs to know how many there are on others."""
    return nn.functional.cross_entropy(output, labels, reduction="sum") / 10


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def _train_joined(num_batches: tuple[int, ...], num_micro: int = 1) -> dict[str, Tensor]:
    """One process: in each step the batches of all ranks that have one; gradients as DistributedDataParallel's."""
    model = _model()
    optimizer = _optimizer(model)
    shares = [_batches(rank, number) for rank, number in enumerate(num_batches)]
    for step in range(max(num_batches)):
        now = [share[step] for share in shares if step < len(share)]
        x, labels = torch.cat([x for x, _ in now]), torch.cat([y for _, y in now])
        torch.autograd.backward(_loss(model(x), labels) / len(num_batches))
        if (step + 1) % num_micro == 0:
            optimizer.step()
            optimizer.zero_grad()
    return model.state_dict()


def _assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=TOLERANCE, atol=TOLERANCE, msg=name)


COUNTS = pytest.mark.parametrize("num_batches", [(5, 3, 0), (0, 4), (3, 3), (1, 2, 6)], ids=str)


@COUNTS
@pytest.mark.parametrize("keeps_step", [True, False], ids=["in-step", "copied-at-the-end"])
def test_ranks_with_unequal_numbers_of_batches_train_as_one_process(
    num_batches: tuple[int, ...], keeps_step: bool
) -> None:
    expected = _train_joined(num_batches)
    for state in run_ranks(len(num_batches), _train_rank, num_batches, keeps_step, {}):
        _assert_close(state, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"forward_sync_buffers": False},
        {"find_unused_parameters": True},
        {"static_graph": True},
        {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.0001},
    ],
    ids=lambda options: next(iter(options)),
)
def test_whatever_the_wrapper_exchanges_is_answered_too(options: dict[str, Any]) -> None:
    expected = _train_joined((5, 3, 0))
    for state in run_ranks(3, _train_rank, (5, 3, 0), True, options):
        _assert_close(state, expected)


def _train_rank(num_batches: tuple[int, ...], keeps_step: bool, options: dict[str, Any]) -> dict[str, Tensor]:
    model = DistributedDataParallel(convert_sync_batchnorm(_model()), **options)
    optimizer = _optimizer(model)
    joinable = JoinableModel(model, EMPTY, after_backward=optimizer.step if keeps_step else None)
    with Join([joinable]):
        for x, labels in _batches(dist.get_rank(), num_batches[dist.get_rank()]):
            optimizer.zero_grad()
            torch.autograd.backward(_loss(joinable(x), labels))
            optimizer.step()
    state: dict[str, Tensor] = model.module.state_dict()
    return state


@pytest.mark.parametrize("num_batches", [(6, 4), (6, 3, 0), (4, 1)], ids=str)
def test_gradients_accumulated_without_synchronization_lose_no_share(num_batches: tuple[int, ...]) -> None:
    expected = _train_joined(num_batches, num_micro=2)
    for state in run_ranks(len(num_batches), _accumulate_on_rank, num_batches):
        _assert_close(state, expected)


def _accumulate_on_rank(num_batches: tuple[int, ...]) -> dict[str, Tensor]:
    model = DistributedDataParallel(convert_sync_batchnorm(_model()))
    optimizer = _optimizer(model)
    joinable = JoinableModel(model, EMPTY, after_backward=optimizer.step)
    with Join([joinable]):
        for step, (x, labels) in enumerate(_batches(dist.get_rank(), num_batches[dist.get_rank()])):
            if step % 2 == 0:
                optimizer.zero_grad()
                with model.no_sync():
                    torch.autograd.backward(_loss(joinable(x), labels))
            else:
                torch.autograd.backward(_loss(joinable(x), labels))
                optimizer.step()
    state: dict[str, Tensor] = model.module.state_dict()
    return state


def test_without_a_wrapper_the_statistics_are_those_of_one_process() -> None:
    reference = nn.BatchNorm1d(3, dtype=torch.float64)
    shares = [_rows(rank, number) for rank, number in enumerate((5, 3, 0))]
    for step in range(5):
        reference(torch.cat([share[step] for share in shares if step < len(share)]))
    for state, grad in run_ranks(3, _statistics_of_rank, (5, 3, 0)):
        _assert_close({name: state[name] for name in BUFFERS}, {name: reference.state_dict()[name] for name in BUFFERS})
        assert grad == 0.0


BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def _rows(rank: int, num_batches: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(3 + step, 3, generator=generator, dtype=torch.float64) for step in range(num_batches)]


def _statistics_of_rank(num_batches: tuple[int, ...]) -> tuple[dict[str, Tensor], float]:
    """Half of the batches without gradients; rank 2 answers all of them."""
    model = SyncBatchNorm(3, dtype=torch.float64)
    joinable = JoinableModel(model, (torch.empty(0, 3, dtype=torch.float64, requires_grad=True),))
    with Join([joinable]):
        for step, x in enumerate(_rows(dist.get_rank(), num_batches[dist.get_rank()])):
            with torch.set_grad_enabled(step % 2 == 0):
                output = joinable(x.requires_grad_())
            if step % 2 == 0:
                torch.autograd.backward(output.square().sum())
                model.zero_grad()
    return model.state_dict(), sum(float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None)


def test_a_subgroup_trains_by_itself() -> None:
    expected = _train_joined((3, 1))
    states = run_ranks(3, _train_in_a_subgroup)
    assert states[0] is None
    for state in states[1:]:
        assert state is not None
        _assert_close(state, expected)


def _train_in_a_subgroup() -> dict[str, Tensor] | None:
    """Ranks 1 and 2 have 3 batches and 1; rank 0 takes no part."""
    group = dist.new_group([1, 2])
    place = dist.get_rank() - 1
    if place < 0:
        return None
    model = DistributedDataParallel(convert_sync_batchnorm(_model(), group), process_group=group)
    optimizer = _optimizer(model)
    joinable = JoinableModel(model, EMPTY, process_group=group)
    with Join([joinable]):
        for x, labels in _batches(place, (3, 1)[place]):
            optimizer.zero_grad()
            torch.autograd.backward(_loss(joinable(x), labels))
            optimizer.step()
    state: dict[str, Tensor] = model.module.state_dict()
    return state


def test_forward_passes_without_gradients_are_answered_without() -> None:
    expected = _model()
    optimizer = _optimizer(expected)
    for step, (x, labels) in enumerate(_batches(0, 4)):
        with torch.set_grad_enabled(step % 2 == 1):
            output = expected(x)
        if step % 2 == 1:
            torch.autograd.backward(_loss(output, labels) / 2)
            optimizer.step()
            optimizer.zero_grad()
    for state, gradients in run_ranks(2, _train_every_second_batch):
        _assert_close(state, expected.state_dict())
        assert gradients == [False, True, False, True]


def _train_every_second_batch() -> tuple[dict[str, Tensor], list[bool]]:
    """Rank 0 alone has batches."""
    model = DistributedDataParallel(convert_sync_batchnorm(_model()))
    gradients: list[bool] = []
    model.module.register_forward_hook(lambda *_: gradients.append(torch.is_grad_enabled()))
    optimizer = _optimizer(model)
    joinable = JoinableModel(model, EMPTY, after_backward=optimizer.step)
    with Join([joinable]):
        for step, (x, labels) in enumerate(_batches(0, 4) if dist.get_rank() == 0 else []):
            optimizer.zero_grad()
            with torch.set_grad_enabled(step % 2 == 1):
                output = joinable(x)
            if step % 2 == 1:
                torch.autograd.backward(_loss(output, labels))
                optimizer.step()
    state: dict[str, Tensor] = model.module.state_dict()
    return state, gradients


def test_another_joinable_may_stand_beside_it() -> None:
    states = run_ranks(2, _train_beside_a_sharded_optimizer)
    _assert_close(states[0], states[1])


def _train_beside_a_sharded_optimizer() -> dict[str, Tensor]:
    model = DistributedDataParallel(convert_sync_batchnorm(_model()))
    with warnings.catch_warnings():  # torch's own module warns of itself when it is imported
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.distributed.optim import ZeroRedundancyOptimizer
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.01)
    joinable = JoinableModel(model, EMPTY)
    with Join([joinable, optimizer]):
        for x, labels in _batches(dist.get_rank(), 2 + 2 * dist.get_rank()):
            model.zero_grad()
            torch.autograd.backward(_loss(joinable(x), labels))
            optimizer.step()
    state: dict[str, Tensor] = model.module.state_dict()
    return state


def test_ending_together_is_left_to_torch() -> None:
    assert run_ranks(2, _train_until_the_first_ends) == [
        (2, "Rank 0 exhausted all inputs."),
        (2, "Detected at least one rank that exhausted inputs. Throwing across all ranks."),
    ]


def _train_until_the_first_ends() -> tuple[int, str]:
    model = DistributedDataParallel(convert_sync_batchnorm(_model()))
    steps: list[int] = []
    with pytest.raises(RuntimeError, match="exhausted") as error:
        _train_until_some_rank_ends(model, steps)
    return len(steps), str(error.value)


def _train_until_some_rank_ends(model: DistributedDataParallel, steps: list[int]) -> None:
    with model.join(throw_on_early_termination=True):
        for x, labels in _batches(dist.get_rank(), 2 + 2 * dist.get_rank()):
            torch.autograd.backward(_loss(model(x), labels))
            steps.append(len(steps))


def test_outside_of_join_it_is_the_model() -> None:
    model = _model()
    x = _batches(0, 1)[0][0]
    assert torch.equal(JoinableModel(model.eval(), EMPTY)(x), model(x))


class Named(nn.Module):
    """Returns a mapping with a scalar that no batch moves, as models with a loss of their own do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = SyncBatchNorm(3, dtype=torch.float64)

    def forward(self, x: Tensor, scale: float) -> dict[str, object]:
        return {"parts": [self.norm(x) * scale, None], "penalty": self.norm.weight.square().mean(), "name": "n"}


def test_outputs_of_any_structure_are_answered_without_a_gradient_of_their_own() -> None:
    for answers in run_ranks(2, _answer_with_a_mapping):
        assert answers == [0.0] * 3


def _answer_with_a_mapping() -> list[float]:
    model = Named()
    grads: list[float] = []

    def note() -> None:
        grads.append(sum(float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None))

    joinable = JoinableModel(model, (torch.empty(0, 3, dtype=torch.float64), 2.0), after_backward=note)
    with Join([joinable]):
        for x in _rows(0, 3) if dist.get_rank() == 0 else []:
            output = joinable(x, 2.0)
            torch.autograd.backward(output["parts"][0].sum())
    return grads if dist.get_rank() == 1 else [0.0] * 3
