"""Other data than that of training: which layers see other moments on it, and which is the first.

A shift that the first layer sees is one of the input (brightness, contrast, noise); one that only later layers see is
one of features. Both data sets must go through the network in the same mode, with the same statistics in the layers
before: otherwise what differs is the mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from syncbn.drift.distances import log_var_ratio, mean_shift
from syncbn.drift.sampling import ImageMoments, log_var_standard_error
from syncbn.drift.significance import two_sided_p
from syncbn.layers import input_of_call, tracked_layers


@dataclass(frozen=True)
class LayerShift:
    """One layer's moments on other data against those on the data of training.

    ``rms_mean_shift``, ``max_mean_shift``: in standard deviations; ``max_mean_shift_channel`` is that of the latter.
    ``mean_log_var_ratio``, ``mean_abs_log_var_ratio``: in nats; the former is above 0 where other data vary more.
    ``mean_p``, ``var_p``: of its least probable mean and variance, times the number of all means and variances that
    were looked at (Bonferroni), at most 1.
    """

    layer: str
    rms_mean_shift: float
    max_mean_shift: float
    max_mean_shift_channel: int
    mean_log_var_ratio: float
    mean_abs_log_var_ratio: float
    mean_p: float
    var_p: float

    @property
    def p(self) -> float:
        """Of the less probable of both."""
        return min(self.mean_p, self.var_p)

    def moved(self, *, level: float = 0.01, size: float = 0.1) -> bool:
        """Whether the layer moved by more than chance does, and by ``size`` standard deviations or nats at least."""
        return self.p < level and max(self.rms_mean_shift, self.mean_abs_log_var_ratio) >= size


@contextmanager
def image_moments(model: nn.Module) -> Iterator[dict[str, ImageMoments]]:
    """Inside the block, what every BatchNorm that keeps running statistics is fed, by path, in order of execution.

    Whatever runs the model counts: a pass of `population_statistics`, say. Of a layer called several times all calls
    count. No collective: it is this rank's own.
    Cost: about two passes over each input, see `ImageMoments.of`.
    """
    seen: dict[str, ImageMoments] = {}

    def note(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        moments = ImageMoments.of(*input_of_call(args, kwargs))
        seen[path] = seen[path].merge(moments) if path in seen else moments

    with ExitStack() as stack:
        for path, layer in tracked_layers(model).items():
            handle = layer.register_forward_pre_hook(
                lambda _, args, kwargs, path=path: note(path, args, kwargs), with_kwargs=True
            )
            stack.callback(handle.remove)
        yield seen


def measure_shift(
    train: Mapping[str, ImageMoments], other: Mapping[str, ImageMoments], *, eps: float = 1e-5
) -> list[LayerShift]:
    """The shift of each layer of ``train`` that is in ``other`` too, in the order of ``train``.

    The images of both must be drawn independently of each other; for variances to be told from chance there must be
    32 at least. With fewer than two images in one of them nothing is significant.
    """
    paths = [path for path in train if path in other]
    num_tests = sum(2 * train[path].mean.numel() for path in paths)
    return [_layer_shift(path, train[path], other[path], eps, num_tests) for path in paths]


def first_moved(shifts: Sequence[LayerShift], *, level: float = 0.01, size: float = 0.1) -> LayerShift | None:
    """The first layer that `LayerShift.moved`; None if none did."""
    return next((shift for shift in shifts if shift.moved(level=level, size=size)), None)


def _layer_shift(path: str, train: ImageMoments, other: ImageMoments, eps: float, num_tests: int) -> LayerShift:
    shift = mean_shift(other.mean, train.mean, train.var, eps)
    ratio = log_var_ratio(other.var, train.var, eps)
    mean_p = _welch(other.mean - train.mean, *_mean_errors(train), *_mean_errors(other))
    var_p = _welch((other.var / train.var).log(), *_log_var_errors(train), *_log_var_errors(other))
    return LayerShift(
        layer=path,
        rms_mean_shift=float(shift.square().mean().sqrt()),
        max_mean_shift=float(shift.abs().max()),
        max_mean_shift_channel=int(shift.abs().argmax()),
        mean_log_var_ratio=float(ratio.mean()),
        mean_abs_log_var_ratio=float(ratio.abs().mean()),
        mean_p=_least_of(mean_p, num_tests),
        var_p=_least_of(var_p, num_tests),
    )


def _least_of(p: Tensor, num_tests: int) -> float:
    """By Bonferroni; a channel whose p is no number proves nothing."""
    return min(1.0, float(p.nan_to_num(1.0).min()) * num_tests)


def _mean_errors(moments: ImageMoments) -> tuple[Tensor, Tensor]:
    """Squared standard errors, and their degrees of freedom."""
    return moments.between_var / moments.num_images, moments.num_images - 1


def _log_var_errors(moments: ImageMoments) -> tuple[Tensor, Tensor]:
    return log_var_standard_error(moments).square(), moments.num_images - 1


def _welch(difference: Tensor, first: Tensor, first_degrees: Tensor, second: Tensor, second_degrees: Tensor) -> Tensor:
    """Two-sided p of a difference whose parts have these squared errors (Welch 1947)."""
    total = first + second
    degrees = total.square() / (first.square() / first_degrees + second.square() / second_degrees)
    return two_sided_p(difference / total.sqrt(), degrees)
