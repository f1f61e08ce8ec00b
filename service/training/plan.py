"""What follows from a spec, without training: ``python -m service.training.plan`` reads one and writes a JobPlan.

The model is built on torch's meta device, which knows shapes and holds no values. Exit status 2: the spec is no job;
then the JSON written is ``{"pointer": ..., "message": ...}``.
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from service.jobs import JobPlan, JobSpec, LayerPlan, Normalization, Outlook, Precision, StopRule
from service.training.dataset import load_dataset
from service.training.models import build_model
from service.training.sampler import BatchSampler
from syncbn.drift.moving_average import initial_weight, lag_steps
from syncbn.outlook import NOISE_LIMIT, Risk, StatisticsOutlook, foresee, typical_design_effect

_FEW_VALUES = 16
_BYTES_OF_DOUBLE = 8


class Impossible(ValueError):
    """The data and the spec do not fit; ``pointer`` names the field to change."""

    def __init__(self, pointer: str, message: str) -> None:
        self.pointer = pointer
        super().__init__(message)


@dataclass(frozen=True)
class _DataShape:
    num_train_images: int
    sample_shape: tuple[int, ...]
    num_classes: int


def plan(spec: JobSpec) -> JobPlan:
    """The plan of ``spec``. Reads its data set, and builds its model without memory.

    Raises: Impossible where the training would refuse to begin; ImportError or FileNotFoundError where the data
        are not on this machine.
    """
    shape = _data_shape(spec.data)
    model = _meta_model(spec, shape)
    steps_per_epoch = _steps_per_epoch(spec, shape.num_train_images)
    total_steps = spec.max_steps or (spec.epochs or 0) * steps_per_epoch
    layers = tuple(_plan_layers(model, spec, shape.sample_shape, total_steps))
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    bytes_of_parameter = 8 if spec.precision is Precision.FLOAT64 else 4
    exchanging = [layer for layer in layers if layer.forward_bytes]
    return JobPlan(
        global_batch_size=spec.global_batch_size,
        normalization_batch_size=spec.normalization_batch_size,
        num_parameters=num_parameters,
        gradient_bytes_per_step=num_parameters * bytes_of_parameter if spec.num_workers > 1 else 0,
        num_train_images=shape.num_train_images,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        layers=layers,
        exchanges_per_step=2 * len(exchanging),
        exchange_bytes_per_step=sum(layer.forward_bytes + layer.backward_bytes for layer in exchanging),
        lag_steps=lag_steps(spec.bn_momentum),
        initial_weight=initial_weight(spec.bn_momentum, total_steps),
        warnings=tuple(_warnings(spec, layers, total_steps)),
    )


def _data_shape(uri: str) -> _DataShape:
    dataset = load_dataset(uri)
    return _DataShape(len(dataset.train_images), tuple(dataset.sample_shape), dataset.num_classes)


def _steps_per_epoch(spec: JobSpec, num_images: int) -> int:
    try:
        sampler = BatchSampler(num_images, spec.batch_size_per_worker, 0, spec.num_workers, spec.seed)
    except ValueError as error:
        raise Impossible("/batch_size_per_worker", str(error)) from error
    return sampler.steps_per_epoch


def _meta_model(spec: JobSpec, shape: _DataShape) -> nn.Module:
    with torch.device("meta"):
        return build_model(spec.model, shape.sample_shape, shape.num_classes, spec.bn_momentum)


def _plan_layers(model: nn.Module, spec: JobSpec, sample_shape: Sequence[int], total_steps: int) -> Iterator[LayerPlan]:
    """Every BatchNorm layer as an image passes it."""
    exchanges = spec.normalization is Normalization.SYNC and spec.num_workers > 1
    for name, layer, input in _inputs_of_layers(model, sample_shape):
        positions = math.prod(input.shape[2:])
        num_channels = layer.num_features
        effect = typical_design_effect(positions)
        expected, worst = (_foresee(spec, positions, total_steps, each) for each in (effect, positions))
        yield LayerPlan(
            layer=name,
            num_channels=num_channels,
            positions_per_image=positions,
            num_values=spec.normalization_batch_size * positions,
            forward_bytes=(2 * num_channels + 1) * _BYTES_OF_DOUBLE if exchanges else 0,
            backward_bytes=2 * num_channels * _BYTES_OF_DOUBLE if exchanges else 0,
            design_effect=effect,
            batch_mean_error=expected.batch_mean_error,
            running_mean_noise=expected.running_mean_noise,
            worst_noise=worst.running_mean_noise,
            var_bias=expected.var_bias,
        )


def _foresee(spec: JobSpec, positions: int, total_steps: int, design_effect: float | None = None) -> StatisticsOutlook:
    return foresee(spec.normalization_batch_size, positions, spec.bn_momentum, total_steps, design_effect)


def _inputs_of_layers(model: nn.Module, sample_shape: Sequence[int]) -> list[tuple[str, _BatchNorm, Tensor]]:
    names = {layer: name for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)}
    seen: list[tuple[str, _BatchNorm, Tensor]] = []

    def note(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, _BatchNorm)
        seen.append((names[layer], layer, args[0]))

    for layer in names:
        layer.register_forward_pre_hook(note)
    model.eval()(torch.empty(1, *sample_shape, device="meta"))
    return seen


def _warnings(spec: JobSpec, layers: Sequence[LayerPlan], total_steps: int) -> Iterator[Outlook]:
    few = [layer for layer in layers if layer.num_values < _FEW_VALUES]
    if few:
        yield _few_values(spec, min(few, key=lambda layer: layer.num_values), len(few))
    if spec.normalization is Normalization.LOCAL and spec.num_workers > 1:
        yield Outlook(
            pointer="/normalization",
            code="statistics_differ",
            message=f"each of {spec.num_workers} workers normalizes by its own {spec.batch_size_per_worker} images, "
            "and the running statistics that are kept are worker 0's; sync normalizes by all together",
        )
    if StopRule.PLATEAU in spec.stop_when and spec.schedule.name == "cosine":
        yield Outlook(
            pointer="/stop_when",
            code="plateau_before_decay",
            message="a loss that rests while the learning rate is high falls again as the cosine schedule lowers it, "
            "and a plateau would end the run before; leave plateau out of stop_when, or take schedule constant",
        )
    if layers:
        noisiest = max(layers, key=lambda layer: layer.running_mean_noise)
        outlook = _foresee(spec, noisiest.positions_per_image, total_steps)
        if Risk.NOISY in outlook.risks:
            yield _noisy(spec, noisiest.layer, outlook)
        if Risk.YOUNG in outlook.risks:
            yield Outlook(
                pointer="/bn_momentum",
                code="statistics_too_young",
                message=f"after {total_steps} steps {outlook.initial_weight:.0%} of the running statistics are still "
                f"what they began with (mean 0, variance 1); train longer, or raise bn_momentum to "
                f"{_rounded_up(outlook.grown_momentum):g}, which leaves 1%",
            )


def _noisy(spec: JobSpec, layer: str, outlook: StatisticsOutlook) -> Outlook:
    noise = outlook.running_mean_noise
    momentum = _rounded_down(outlook.quiet_momentum)
    images = f"{outlook.quiet_images} images a batch statistic instead of {spec.normalization_batch_size}"
    if spec.normalization is Normalization.LOCAL and spec.global_batch_size >= outlook.quiet_images:
        images += " (normalization sync has them)"
    if outlook.quiet_momentum < outlook.grown_momentum:
        pointer, remedy = "/batch_size_per_worker", f"take {images}: a lower bn_momentum would stay near its beginning"
    else:
        pointer, remedy = "/bn_momentum", f"lower bn_momentum to {momentum:g}, or take {images}"
    return Outlook(
        pointer=pointer,
        code="statistics_too_noisy",
        message=f"the running means of layer {layer} will be off by about {noise:.2f} standard deviations by chance "
        f"alone, and from {NOISE_LIMIT:g} on they are not fit to be shipped; {remedy}",
    )


def _rounded_down(momentum: float) -> float:
    """To two digits, so that what is recommended keeps what it promises."""
    unit = 10.0 ** (math.floor(math.log10(momentum)) - 1)
    return math.floor(momentum / unit) * unit


def _rounded_up(momentum: float) -> float:
    unit = 10.0 ** (math.floor(math.log10(momentum)) - 1)
    return min(1.0, math.ceil(momentum / unit) * unit)


def _few_values(spec: JobSpec, layer: LayerPlan, num_layers: int) -> Outlook:
    value = layer.num_values
    if value < 2:
        effect = "a single value has no variance, and training would refuse it"
    elif value == 2:
        effect = "two values are normalized to plus and minus one, whatever they are: the layer passes on signs only"
    else:
        # The relative standard error of the variance of n normal values is sqrt(2 / (n - 1)).
        effect = f"the variance of {value} values is off by {math.sqrt(2 / (value - 1)):.0%} or more"
    local = spec.normalization is Normalization.LOCAL and spec.num_workers > 1
    remedies = ["a larger batch_size_per_worker", *(["normalization sync"] if local else [])]
    return Outlook(
        pointer="/batch_size_per_worker",
        code="few_values",
        message=f"layer {layer.layer}{f' (and {num_layers - 1} more)' if num_layers > 1 else ''} rests its batch "
        f"statistics on {value} values a channel; {effect}; {' or '.join(remedies)} helps",
    )


def main() -> int:
    """One spec from stdin, its plan to stdout."""
    try:
        answer = plan(JobSpec.model_validate_json(sys.stdin.read())).model_dump_json()
    except Impossible as error:
        print(json.dumps({"pointer": error.pointer, "message": str(error)}))  # noqa: T201
        return 2
    except (ImportError, OSError, ValueError) as error:
        print(json.dumps({"pointer": "/data", "message": str(error)}))  # noqa: T201
        return 2
    print(answer)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
