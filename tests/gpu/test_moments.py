"""Statistics on a CUDA device, as exact as on the CPU."""

import pytest
import torch
from torch import Tensor

from syncbn import SyncBatchNorm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and torch sees none here")

FAR = {torch.float32: 1e4, torch.float64: 1e4, torch.float16: 500.0, torch.bfloat16: 60.0}
"""Means in standard deviations; half-precision types hold no variance beside a larger one."""


def _formats(values: Tensor) -> dict[str, Tensor]:
    """``(N, C, H, W)`` in other numbers of dimensions and memory formats, by name."""
    return {
        "2d": values.movedim(1, -1).reshape(-1, values.size(1)),
        "4d": values,
        "4d, channels last": values.contiguous(memory_format=torch.channels_last),
        "with gaps": values.repeat_interleave(2, 3)[..., ::2],
    }


@pytest.mark.parametrize("shape", [(6, 4, 24, 24), (64, 8, 96, 96), (2, 3, 1000, 1000)], ids=str)
@pytest.mark.parametrize("dtype", FAR, ids=str)
def test_a_far_mean_keeps_its_variance_to_1e_5_on_the_device(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator("cuda").manual_seed(1)
    values = torch.randn(shape, generator=generator, dtype=torch.float64, device="cuda") + FAR[dtype]
    for name, x in _formats(values.to(dtype)).items():
        layer = SyncBatchNorm(shape[1], momentum=1.0, device="cuda", dtype=torch.promote_types(dtype, torch.float32))
        assert layer(x).isfinite().all(), name
        var, mean = torch.var_mean(x.double(), [dim for dim in range(x.dim()) if dim != 1])
        assert ((layer.get_buffer("running_mean") / mean - 1).abs() <= 1e-7).all(), name
        assert ((layer.get_buffer("running_var") / var - 1).abs() <= 1e-5).all(), name
