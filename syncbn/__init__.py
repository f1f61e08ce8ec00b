"""Synchronized batch normalization for torch: exact over all ranks, on CPU (gloo) and CUDA (NCCL)."""

__version__ = "0.1.0"
