import functools
import math
import threading
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import syncbn
from service.jobs import NonFinite, NonFinitePlace, StepMetrics
from service.training.loop import train
from service.training.non_finite import first_non_finite
from tests.ranks import run_ranks
from tests.service.training.runs import of, own_context, tiny_spec


def _model(with_norm: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    norm = [nn.BatchNorm1d(5)] if with_norm else []
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 5), *norm, nn.ReLU(), nn.Linear(5, 3))


def _batch(size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 1, 2, 2, generator=generator), torch.arange(size) % 3


def _parameter(model: nn.Sequential, name: str) -> Tensor:
    return dict(model.named_parameters())[name]


def _search(model: nn.Module, images: Tensor, labels: Tensor) -> NonFinite:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = first_non_finite(model, images, labels, 7, nullcontext)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return found


def test_the_first_tensor_in_order_of_execution_is_named() -> None:
    images, labels = _batch()
    model = _model()
    broken = images.clone()
    broken[2, 0, 1, 1] = math.nan
    assert _search(model, broken, labels) == NonFinite(
        step=7, place=NonFinitePlace.INPUT, tensor="", detail="1 NaN of 24 values"
    )
    with torch.no_grad():
        _parameter(model, "4.weight")[1, 2] = math.inf
        _parameter(model, "2.bias")[0] = math.nan
    found = _search(model, images, labels)
    assert (found.place, found.tensor, found.detail) == (NonFinitePlace.PARAMETER, "2.bias", "1 NaN of 5 values")


def test_an_overflow_is_found_where_it_happens() -> None:
    images, labels = _batch()
    model = _model(with_norm=False)
    with torch.no_grad():
        _parameter(model, "1.weight").mul_(1e30)
        _parameter(model, "3.weight").mul_(1e20)
    found = _search(model, images, labels)
    assert (found.place, found.tensor) == (NonFinitePlace.ACTIVATION, "3")
    with torch.no_grad():
        _parameter(model, "1.weight").mul_(1e-30)
        _parameter(model, "3.weight").mul_(1e-20)
        _parameter(model, "3.bias")[:2] = torch.tensor([3e38, -3e38])  # the logits are finite, their differences not
    found = _search(model, images, labels)
    assert (found.place, found.tensor, found.detail) == (NonFinitePlace.LOSS, "", "1 infinite of 1 values")


def test_running_statistics_count_only_where_they_are_used() -> None:
    images, labels = _batch()
    model = _model()
    running_mean = dict(model.named_buffers())["2.running_mean"]
    running_mean[1] = math.nan
    assert _search(model, images, labels).place is NonFinitePlace.OTHER_RANK
    syncbn.freeze(model)
    found = _search(model, images, labels)
    assert (found.place, found.tensor) == (NonFinitePlace.RUNNING_STATISTICS, "2.running_mean")


def test_whoever_watches_the_model_is_not_disturbed() -> None:
    images, labels = _batch()
    model, calls, lock = _model(), [], threading.Lock()  # a lock cannot be copied

    def watch(*_: object) -> None:
        with lock:
            calls.append(1)

    handle = model[1].register_forward_pre_hook(functools.partial(watch, lock))
    assert first_non_finite(model, images, labels, 7, nullcontext).place is NonFinitePlace.OTHER_RANK
    assert calls == []
    handle.remove()


def test_a_single_image_is_searched_too() -> None:
    images, labels = _batch(1)
    assert _search(syncbn.convert_sync_batchnorm(_model()), images, labels).place is NonFinitePlace.OTHER_RANK


def _search_with_one_broken_rank(broken_rank: int) -> tuple[bool, NonFinite]:
    model = syncbn.convert_sync_batchnorm(_model())
    images, labels = _batch()
    if dist.get_rank() == broken_rank:
        images[0] = math.inf
    loss = F.cross_entropy(model(images), labels)
    return bool(loss.isfinite()), first_non_finite(model, images, labels, 3, nullcontext)


def test_the_rank_that_brought_it_is_told_from_those_that_it_reached() -> None:
    ranks = run_ranks(3, _search_with_one_broken_rank, 1)
    assert [finite for finite, _ in ranks] == [False] * 3
    places = [found.place for _, found in ranks]
    assert places == [NonFinitePlace.OTHER_RANK, NonFinitePlace.INPUT, NonFinitePlace.OTHER_RANK]


def test_a_run_tells_once_where_its_losses_ceased_to_be_numbers(tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path, num_workers=1, batch_size_per_worker=8, optimizer={"name": "sgd", "learning_rate": 1e30})
    events = list(train(spec, own_context(tmp_path / "job")))
    (told,) = of(NonFinite, events)
    steps = [event.step for event in of(StepMetrics, events) if not math.isfinite(event.loss)]
    assert told.step == steps[0]
    assert told.place in (NonFinitePlace.PARAMETER, NonFinitePlace.ACTIVATION, NonFinitePlace.LOSS)
    assert told.tensor or told.place is NonFinitePlace.LOSS
