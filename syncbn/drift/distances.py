"""Distances between stored and true moments of one channel, each with its unit.

Symbols, per channel: ``u``, ``w`` the running mean and variance, ``p``, ``q`` those of the population; ``eps`` is added
to both variances, as the layer does. `mean_shift`, `log_var_ratio` and `output_error` assume nothing of the values;
the others are distances between the normal distributions of these moments. All of ``(C,)`` in float64, and unchanged
when a channel is rescaled (save by eps). Without eps and with a variance of 0 they are infinite or NaN, as the
formulas say.
"""

import math

import torch
from torch import Tensor

_WIDTH = 9.0  # standard deviations on either side of a mean; beyond are 2e-19 of the values
_NUM_NODES = 200  # for each of the two distributions


def mean_shift(running_mean: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """``(u - p) / sqrt(q + eps)``, in standard deviations of the population, signed. Shape ``(C,)``."""
    return (running_mean.double() - mean.double()) / (var.double() + eps).sqrt()


def log_var_ratio(running_var: Tensor, var: Tensor, eps: float) -> Tensor:
    """``ln((w + eps) / (q + eps))``, in nats, signed. Shape ``(C,)``."""
    return ((running_var.double() + eps) / (var.double() + eps)).log()


def output_error(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """Mean squared change of the normalized values when ``u, w`` stand in for ``p, q``. Shape ``(C,)``.

    With ``d = (p - u) / sqrt(w + eps)`` and ``r = sqrt((q + eps) / (w + eps))`` it is
    ``d^2 + (r - 1)^2 * q / (q + eps)``, whatever the distribution of the values: ``(x - u) / sqrt(w + eps)`` is
    ``r * z + d`` with ``z = (x - p) / sqrt(q + eps)``, which has mean 0 and variance ``q / (q + eps)``.
    """
    mean, var, running_var = mean.double(), var.double(), running_var.double()
    shift = (mean - running_mean.double()) / (running_var + eps).sqrt()
    ratio = ((var + eps) / (running_var + eps)).sqrt()
    return shift.square() + (ratio - 1).square() * (var / (var + eps))


def symmetric_kl(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, eps: float = 0.0) -> Tensor:
    """``(w/q + q/w - 2) / 2 + (u - p)^2 (1/w + 1/q) / 2``, in nats, ``[0, inf)``. Shape ``(C,)``.

    The divergence of Jeffreys 1946: that of Kullback and Leibler, both ways added up. A collapsed channel alone
    decides a mean of it over channels; take the median.
    """
    u, w, p, q = _moments(running_mean, running_var, mean, var, eps)
    ratio = w / q
    return (ratio + 1 / ratio - 2) / 2 + (u - p).square() * (1 / w + 1 / q) / 2


def wasserstein(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, eps: float = 0.0) -> Tensor:
    """``sqrt((u - p)^2 + (sqrt w - sqrt q)^2) / sqrt q``, in standard deviations of the population. Shape ``(C,)``.

    The 2-Wasserstein distance in one dimension (Dowson and Landau 1982): how far values must move on average (rms).
    """
    u, w, p, q = _moments(running_mean, running_var, mean, var, eps)
    return ((u - p).square() + (w.sqrt() - q.sqrt()).square()).sqrt() / q.sqrt()


def hellinger(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, eps: float = 0.0) -> Tensor:
    """``sqrt(1 - sqrt(2 sqrt(w q) / (w + q)) exp(-(u - p)^2 / (4 (w + q))))``, from 0 to 1. Shape ``(C,)``.

    The root of one less the overlap of both densities, which is that of Bhattacharyya 1943.
    """
    u, w, p, q = _moments(running_mean, running_var, mean, var, eps)
    # Both factors as logarithms, so that a small distance keeps its digits: 1 - exp(x) is -expm1(x).
    log_overlap = -torch.log1p((w.sqrt() - q.sqrt()).square() / (2 * (w * q).sqrt())) / 2
    return (-torch.expm1(log_overlap - (u - p).square() / (4 * (w + q)))).sqrt()


def jensen_shannon(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, eps: float = 0.0) -> Tensor:
    """Mean divergence of both normal distributions from their equal mixture, in nats, from 0 to ln 2. Shape ``(C,)``.

    It has no closed form: this is the trapezoid rule on nodes spread over both, good to 1e-4 nats.
    Cost: ``400 C`` exponentials and logarithms, about a hundred times that of `hellinger`.
    Source: Lin 1991.
    """
    u, w, p, q = _moments(running_mean, running_var, mean, var, eps)
    grid = torch.linspace(-_WIDTH, _WIDTH, _NUM_NODES, dtype=torch.float64, device=u.device).unsqueeze(1)
    nodes = torch.cat([u + grid * w.sqrt(), p + grid * q.sqrt()]).sort(0).values
    log_first, log_second = _log_density(nodes, u, w), _log_density(nodes, p, q)
    log_mixture = torch.logaddexp(log_first, log_second) - math.log(2)
    integrand = _divergence(log_first, log_mixture) + _divergence(log_second, log_mixture)
    return (torch.trapezoid(integrand, nodes, dim=0) / 2).clamp(0, math.log(2))


def _moments(u: Tensor, w: Tensor, p: Tensor, q: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return u.double(), w.double() + eps, p.double(), q.double() + eps


def _log_density(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return -((x - mean).square() / var + (2 * math.pi * var).log()) / 2


def _divergence(log_density: Tensor, log_mixture: Tensor) -> Tensor:
    return log_density.exp() * (log_density - log_mixture)
