"""The monitor on live models: what it hears, that it changes nothing, and what real ranks tell each other."""

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from syncbn import RanksDisagree, SyncBatchNorm, accumulate_statistics, convert_sync_batchnorm, freeze
from syncbn.monitor import BatchNormMonitor, BatchNormSample, LayerSample
from tests.ranks import run_ranks
from tests.syncbn.collectives import CollectiveLog

F64 = torch.float64
NUM_STEPS = 60


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 16, 10),
    )  # fmt: skip


def _digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)


def _hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def _first(sample: BatchNormSample | None) -> LayerSample:
    assert sample is not None
    return sample.layers[0]


def test_a_sample_is_what_the_formulas_say() -> None:
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(3, momentum=0.2, dtype=F64)
    x = torch.randn(6, 3, 4, 5, dtype=F64) + torch.randn(6, 3, 1, 1, dtype=F64) + 0.3
    with BatchNormMonitor(nn.Sequential(layer), every=8) as monitor:
        for _ in range(7):
            layer(x)
            assert monitor.step() is None
        before = layer.running_mean
        assert before is not None
        u = before.numpy().copy()
        layer(x)
        sample = monitor.step()
    assert sample is not None
    assert sample.step == 8
    assert (sample.ranks, sample.repeating_ranks, sample.idle, sample.not_compared) == ((), (), (), ())
    (told,) = sample.layers
    values = x.numpy()
    s2 = values.mean((2, 3)).var(0, ddof=1)
    weights = 0.2 * 0.8 ** np.arange(7)  # of the seven batches in the running mean
    z = np.abs(values.mean((0, 2, 3)) - u) / np.sqrt(s2 / 6 * (1 + np.sum(weights**2)))
    pooled = values.var((0, 2, 3)) + s2 / 6
    assert (told.layer, told.num_channels, told.num_images, told.positions_per_image) == ("0", 3, 6, 20)
    assert told.design_effect == pytest.approx(np.median(20 * s2 / pooled), rel=1e-9)
    noise = np.sqrt(np.mean(s2 / 6 * np.sum(weights**2) / values.var((0, 2, 3))))
    assert told.mean_shift_noise == pytest.approx(noise, rel=1e-9)
    scale = 41 / 43  # Student's t with 5 degrees of freedom on the scale of a normal deviate, by Wallace
    scores = np.sqrt(5 * np.log1p(z**2 / 5)) * scale
    assert told.max_abs_z == pytest.approx(scores.max(), rel=1e-9)
    assert told.max_abs_z_channel == scores.argmax()
    assert told.share_beyond_3 == np.mean(scores > 3)
    assert told.buffers_equal


def test_hooks_are_there_in_sampled_steps_only_and_none_is_left() -> None:
    model = _network()
    monitor = BatchNormMonitor(model, every=3)
    seen = []
    for _ in range(7):
        seen.append(_hooks(model))
        model(torch.randn(4, 1, 8, 8))
        monitor.step()
    assert seen == [0, 0, 4, 0, 0, 4, 0]
    monitor.step()
    assert _hooks(model) == 4
    monitor.detach()
    assert _hooks(model) == 0
    assert [monitor.step() for _ in range(4)] == [None] * 4
    assert _hooks(model) == 0


def test_a_run_taken_up_again_samples_the_same_steps() -> None:
    layer = nn.BatchNorm1d(2)
    with BatchNormMonitor(layer, every=4, first_step=5) as monitor:
        steps = []
        for _ in range(8):
            layer(torch.randn(3, 2))
            sample = monitor.step()
            steps += [] if sample is None else [sample.step]
    assert steps == [8, 12]


def _sampled(model: nn.Module, *calls: Tensor, **options: bool) -> BatchNormSample | None:
    with BatchNormMonitor(model, every=1) as monitor:
        for x in calls:
            if options.get("checkpointed"):
                checkpoint(model, x.requires_grad_(), use_reentrant=bool(options.get("reentrant"))).sum().backward()
            else:
                model(x)
        return monitor.step()


def test_several_forwards_of_a_step_count_as_one_batch() -> None:
    x = torch.randn(9, 4, 5)
    layer = nn.BatchNorm1d(4)
    whole = _first(_sampled(copy.deepcopy(layer), x))
    parts = _first(_sampled(copy.deepcopy(layer), x[:2], x[2:]))
    assert parts.num_images == whole.num_images == 9
    assert parts.design_effect == pytest.approx(whole.design_effect, rel=1e-6)
    with BatchNormMonitor(nn.Sequential(convert_sync_batchnorm(layer)), every=1) as monitor:
        model = monitor._layers["0"]
        with accumulate_statistics(model):
            model(x[:2])
            model(x[2:])
        assert _first(monitor.step()).max_abs_z == pytest.approx(whole.max_abs_z, rel=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_counts_once(reentrant: bool) -> None:
    x = torch.randn(5, 3)
    layer = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    plain = _sampled(copy.deepcopy(layer), x.clone())
    assert _sampled(copy.deepcopy(layer), x.clone(), checkpointed=True, reentrant=reentrant) == plain


def test_evaluation_between_steps_does_not_count() -> None:
    model, x = nn.Sequential(nn.BatchNorm1d(3)), torch.randn(6, 3)
    with BatchNormMonitor(model, every=1) as monitor:
        model(x)
        model.eval()
        model(100 + x)
        model.train()
        assert _first(monitor.step()).num_images == 6


def test_frozen_and_idle_layers_are_named_and_others_sampled() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    freeze(model[0])
    with BatchNormMonitor(model, every=1) as monitor:
        model[1](model[0](torch.randn(4, 3)))
        sample = monitor.step()
        assert sample is not None
        assert [layer.layer for layer in sample.layers] == ["1"]
        assert sample.idle == ("0", "2")
        empty = monitor.step()
        assert empty is not None
        assert (empty.layers, empty.idle) == ((), ("0", "1", "2"))


# The compiler itself uses what torch says is deprecated.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_layers_that_ran_inside_compiled_code_are_told_from_idle_ones() -> None:
    inner = nn.Sequential(nn.BatchNorm1d(3), SyncBatchNorm(3), freeze(nn.BatchNorm1d(3)))
    inner.compile(backend="eager")
    uncounted = nn.BatchNorm1d(3)
    uncounted.num_batches_tracked = None
    model = nn.Sequential(nn.BatchNorm1d(3), inner, nn.BatchNorm1d(3), uncounted)
    ran, rest = ("1.0", "1.1"), ("1.2", "2", "3")
    x = torch.randn(4, 3)
    # Without gradients, as the compiler itself asks values in between for theirs, which warns.
    with torch.no_grad(), BatchNormMonitor(model, every=2) as monitor:
        _ = model[0](x), inner(x)
        assert monitor.step() is None
        _ = model[0](x), inner(x)
        through = monitor.step()
        _ = model[0](x), inner(x)
        assert monitor.step() is None
        model[0](x)
        past = monitor.step()
    assert through is not None
    assert past is not None
    assert [layer.layer for layer in through.layers] == [layer.layer for layer in past.layers] == ["0"]
    assert (through.unheard, through.idle) == (ran, rest)
    assert (past.unheard, past.idle) == ((), ran + rest)  # they ran in a step that was not sampled


@pytest.mark.parametrize("by_keyword", [False, True])
def test_what_is_masked_does_not_count(by_keyword: bool) -> None:
    x = torch.randn(5, 3, 4)
    padded, mask = F.pad(x, (0, 3), value=torch.nan), torch.arange(7).expand(5, 7) < 4
    layer = SyncBatchNorm(3)
    plain = _first(_sampled(copy.deepcopy(layer), x))
    with BatchNormMonitor(layer, every=1) as monitor:
        layer(input=padded, mask=mask) if by_keyword else layer(padded, mask)
        told = _first(monitor.step())
    assert told.positions_per_image == 4
    assert (told.num_images, told.num_exploding, told.num_dead) == (5, 0, 0)
    assert told.design_effect == pytest.approx(plain.design_effect, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_in_full(dtype: torch.dtype) -> None:
    x = (torch.randn(8, 3, 4, 4) + 3).to(dtype)
    told = _first(_sampled(SyncBatchNorm(3), x))
    exact = _first(_sampled(SyncBatchNorm(3, dtype=F64), x.double()))
    assert told.design_effect == pytest.approx(exact.design_effect, rel=1e-5)
    assert told.max_abs_z == pytest.approx(exact.max_abs_z, rel=1e-5)


def test_channels_are_sorted_by_what_is_wrong_with_them() -> None:
    layer = nn.BatchNorm2d(40)
    with torch.no_grad():
        layer.weight[1], layer.bias[2] = 1e-4, -10.0
    x = torch.randn(8, 40, 4, 4)
    x[:, 0] = 0.5
    with BatchNormMonitor(layer, every=1) as monitor:
        layer(x)
        told = _first(monitor.step())
        assert (told.collapsed, told.muted, told.dead, told.exploding) == ((0,), (1,), (2,), ())
        x[:, 3:38] *= 1e4
        x[0, 38] = torch.nan
        layer(x)
        told = _first(monitor.step())
    assert (told.collapsed, told.muted, told.dead) == ((0,), (1,), (2,))
    assert told.num_exploding == 36
    assert told.exploding == tuple(range(3, 35))


def test_too_few_images_are_said_to_tell_nothing() -> None:
    told = _first(_sampled(nn.BatchNorm2d(2), torch.randn(1, 2, 4, 4)))
    assert np.isnan([told.design_effect, told.mean_shift_noise, told.share_beyond_3, told.max_abs_z]).all()


def test_a_monitor_that_could_never_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="every must be at least 1"):
        BatchNormMonitor(nn.BatchNorm1d(2), every=0)
    with pytest.raises(ValueError, match="is a LazyBatchNorm1d that has no size yet"):
        BatchNormMonitor(nn.LazyBatchNorm1d())


def test_training_is_the_same_to_the_last_bit_with_and_without() -> None:
    for plain, watched, num_collectives in run_ranks(2, _train_twice):
        assert plain.keys() == watched.keys()
        assert all(torch.equal(plain[name], watched[name]) for name in plain)
        assert num_collectives == (0, 1)  # of a step that is not sampled, and of one that is


def _train_twice() -> tuple[dict[str, Tensor], dict[str, Tensor], tuple[int, int]]:
    return _train(every=0)[0], *_train(every=7)


def _train(every: int) -> tuple[dict[str, Tensor], tuple[int, int]]:
    model = DistributedDataParallel(convert_sync_batchnorm(_network()))
    monitor = BatchNormMonitor(model, every=every) if every else None
    extra = []
    for images, labels in _batches(4, 0, NUM_STEPS):
        _step(model, images, labels)
        with CollectiveLog() as log:
            if monitor is not None:
                monitor.step()
        extra.append(len(log.collectives))
    return model.module.state_dict(), (extra[0], extra[6])


def _step(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    model.zero_grad()
    F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.sub_(parameter.grad, alpha=0.05)


def _batches(batch_size: int, seed: int, num_batches: int) -> Iterator[tuple[Tensor, Tensor]]:
    images, labels = _digits()
    generator = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
    for _ in range(num_batches):
        chosen = torch.randint(len(images), (batch_size,), generator=generator)
        yield images[chosen], labels[chosen]


FAULTS = ("none", "brighter 0.03", "brighter 0.1", "brighter 0.7", "contrast", "repeated")


def test_the_rank_that_sees_other_images_is_named_on_all_ranks() -> None:
    ranks = run_ranks(4, _watch_faults, timeout_s=100.0)
    assert all(answer == ranks[0] for answer in ranks)
    healthy, slight, brighter, bright, contrast, repeated = (ranks[0][fault] for fault in FAULTS)
    assert not any(finding.is_significant for finding in healthy.ranks)
    assert (healthy.repeating_ranks, healthy.differing_ranks, healthy.not_compared) == ((), {}, ())
    assert max(slight.ranks, key=lambda one: abs(one.z)).rank == 2
    for sample in (brighter, bright, contrast):
        assert [finding.is_significant for finding in sample.ranks] == [False, False, True, False]
        assert sample.ranks[2].layer == "1"
    assert bright.ranks[2].fires
    assert abs(bright.ranks[2].size) > abs(brighter.ranks[2].size)
    assert repeated.repeating_ranks == (2,)
    assert all(layer.buffers_equal for sample in ranks[0].values() for layer in sample.layers)


def _watch_faults() -> dict[str, BatchNormSample]:
    return {fault: _watch(fault) for fault in FAULTS}


def _watch(fault: str) -> BatchNormSample:
    """The last of 10 samples."""
    model = DistributedDataParallel(convert_sync_batchnorm(_network()))
    sample = None
    with BatchNormMonitor(model, every=1) as monitor:
        for images, labels in _batches(16, 1, 10):
            _step(model, _seen(images, fault) if dist.get_rank() == 2 else images, labels)
            sample = monitor.step()
    assert sample is not None
    return sample


def _seen(images: Tensor, fault: str) -> Tensor:
    kind, _, amount = fault.partition(" ")
    match kind:
        case "brighter":
            return images + float(amount)
        case "contrast":
            return images * 1.5
        case "repeated":
            return images[:1].expand_as(images)
    return images


def test_ranks_need_not_have_equal_batches_nor_any_and_tell_which_buffers_differ() -> None:
    samples = run_ranks(3, _uneven)
    assert samples[0] == samples[1] == samples[2]
    sample = samples[0]
    assert [layer.num_images for layer in sample.layers] == [7, 7]
    assert sample.differing_ranks == {"1": (2,)}
    assert [layer.buffers_equal for layer in sample.layers] == [True, False]
    local, untold = run_ranks(2, _local_layers)
    assert local is not None
    assert untold is None
    assert local.not_compared == ("4",)
    assert local.differing_ranks == {}
    assert not any(layer.buffers_equal for layer in local.layers)


def _uneven() -> BatchNormSample:
    torch.manual_seed(0)
    second = SyncBatchNorm(3)
    model = nn.Sequential(SyncBatchNorm(3), second)
    assert second.running_var is not None
    sample = None
    with BatchNormMonitor(model, every=1) as monitor:
        for _ in range(6):
            model(torch.randn((5, 0, 2)[dist.get_rank()], 3))
            if dist.get_rank() == 2:
                second.running_var[0] *= 1 + 2**-20
            sample = monitor.step()
    assert sample is not None
    return sample


def _local_layers() -> BatchNormSample | None:
    """Which rank 0 alone tells."""
    model = DistributedDataParallel(_network())
    with BatchNormMonitor(model, every=1, is_teller=dist.get_rank() == 0) as monitor:
        for images, labels in _batches(4, 2, 1):
            _step(model, images, labels)
        return monitor.step()


GROUPS = ([[0, 1, 2], [3]], [[0], [1], [2], [3]], [[0, 1], [2, 3]])


def test_the_rank_that_synchronizes_with_nobody_is_named_on_all_ranks() -> None:
    ranks = run_ranks(4, _watch_groups)
    assert all(answer == ranks[0] for answer in ranks)
    alone, apart, pairs, equal = ranks[0]
    assert alone.differing_ranks == {"1": (3,), "4": (3,)}
    assert alone.not_compared == ("4",)
    assert [layer.num_images for layer in alone.layers] == [16, 16]
    for fair in (apart, pairs):
        assert (fair.differing_ranks, fair.not_compared) == ({}, ("4",))
        assert not any(layer.buffers_equal for layer in fair.layers)
    assert equal.differing_ranks == {}
    assert all(layer.buffers_equal for layer in equal.layers)


def _watch_groups() -> list[BatchNormSample]:
    """With one rank alone, all of them, pairs, and one alone whose statistics stay those of the others."""
    unmoved = _watch_group(GROUPS[0], momentum=0.0)
    return [*(_watch_group(members, momentum=0.1) for members in GROUPS), unmoved]


def _watch_group(members: list[list[int]], momentum: float) -> BatchNormSample:
    groups = [dist.new_group(ranks) for ranks in members]
    own = next(group for group, ranks in zip(groups, members, strict=True) if dist.get_rank() in ranks)
    model = convert_sync_batchnorm(_network(), own)
    for layer in model.modules():
        if isinstance(layer, SyncBatchNorm):
            layer.momentum = momentum
    with BatchNormMonitor(model, every=1) as monitor:
        for images, labels in _batches(4, 3, 1):
            _step(model, images, labels)
        sample = monitor.step()
    assert sample is not None
    return sample


def test_ranks_at_different_steps_are_told_so() -> None:
    for message in run_ranks(2, _out_of_step):
        assert "rank 0 is at the sample of BatchNorm layers in step 1" in message
        assert "rank 1 is at the sample of BatchNorm layers in step 2" in message


def _out_of_step() -> str:
    layer = SyncBatchNorm(2)
    with BatchNormMonitor(layer, every=1, first_step=dist.get_rank()) as monitor:
        with pytest.raises(RanksDisagree) as error:
            monitor.step()
        return str(error.value)
