"""Batch normalization in numpy and float64, straight from the formulas of Ioffe and Szegedy 2015, section 3."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Reckoned:
    """Output, gradients and batch statistics of one batch ``(N, C, *)``; both variances, ``(C,)``."""

    output: Array
    input_grad: Array
    weight_grad: Array
    bias_grad: Array
    mean: Array
    unbiased_var: Array


def reckon(x: Any, dy: Any, weight: Any, bias: Any, eps: float = 1e-5) -> Reckoned:
    """Of arrays or tensors on the CPU, whatever their type."""
    x, dy, weight, bias = (np.asarray(value, dtype=np.float64) for value in (x, dy, weight, bias))
    axes = (0, *range(2, x.ndim))
    shape = (1, -1, *[1] * (x.ndim - 2))
    count = x.size // x.shape[1]
    mean, var = x.mean(axes), x.var(axes)
    inverse_std = (1 / np.sqrt(var + eps)).reshape(shape)
    x_hat = (x - mean.reshape(shape)) * inverse_std
    bias_grad, weight_grad = dy.sum(axes), (dy * x_hat).sum(axes)
    rest = (bias_grad.reshape(shape) + x_hat * weight_grad.reshape(shape)) / count
    return Reckoned(
        output=x_hat * weight.reshape(shape) + bias.reshape(shape),
        input_grad=weight.reshape(shape) * inverse_std * (dy - rest),
        weight_grad=weight_grad,
        bias_grad=bias_grad,
        mean=mean,
        unbiased_var=x.var(axes, ddof=1),
    )
