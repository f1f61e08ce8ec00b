"""Writes data sets in the IDX format for tests: the format by the book, apart from the reader under test."""

import gzip
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt


def idx_bytes(array: npt.NDArray[np.uint8]) -> bytes:
    """The array as an IDX file of unsigned bytes."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_data_set(folder: Path, num_train: int = 48, num_validation: int = 21, zipped: bool = False) -> str:
    """Four files of 6x6 images in three classes, told apart by their brightest row; the URI of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(42)
    for part, num_images in (("train", num_train), ("t10k", num_validation)):
        labels = np.arange(num_images, dtype=np.uint8) % 3
        images = random.integers(0, 150, (num_images, 6, 6), dtype=np.uint8)
        images[np.arange(num_images), labels * 2] += 90
        _write(folder / f"{part}-images-idx3-ubyte", images, zipped)
        _write(folder / f"{part}-labels-idx1-ubyte", labels, zipped)
    return f"idx:{folder}"


def _write(path: Path, array: npt.NDArray[np.uint8], zipped: bool) -> None:
    content = idx_bytes(array)
    if zipped:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)
