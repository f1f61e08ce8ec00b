"""Data sets with something wrong in them, written as IDX files of scikit-learn's digits."""

import struct
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

_Bytes = npt.NDArray[np.uint8]
_VALIDATION_EVERY = 5
_FINER = 15


@dataclass(frozen=True)
class Digits:
    """Images ``(N, 8, 8)`` with pixels of 0 to 16, and labels ``(N,)``."""

    train_images: _Bytes
    train_labels: _Bytes
    validation_images: _Bytes
    validation_labels: _Bytes

    def chosen(self, places: npt.NDArray[np.int64]) -> "Digits":
        """With these training images, in this order."""
        return replace(self, train_images=self.train_images[places], train_labels=self.train_labels[places])

    def write(self, folder: Path) -> str:
        """Four files; the URI of the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for part, images, labels in (
            ("train", self.train_images, self.train_labels),
            ("t10k", self.validation_images, self.validation_labels),
        ):
            (folder / f"{part}-images-idx3-ubyte").write_bytes(_idx(images))
            (folder / f"{part}-labels-idx1-ubyte").write_bytes(_idx(labels))
        return f"idx:{folder}"


@cache
def digits() -> Digits:
    """Every fifth image, in an order of chance that is always the same, is for validation."""
    from sklearn.datasets import load_digits  # which costs seconds, and most ranks need none

    loaded = load_digits()
    order = np.random.default_rng(0).permutation(len(loaded.target))
    images, labels = loaded.images[order].astype(np.uint8), loaded.target[order].astype(np.uint8)
    validates = np.arange(len(labels)) % _VALIDATION_EVERY == 0
    return Digits(images[~validates], labels[~validates], images[validates], labels[validates])


def with_wrong_labels(share: float, seed: int) -> Digits:
    """That ``share`` of the training labels is drawn anew from all ten."""
    clean = digits()
    random = np.random.default_rng((seed, 21))
    wrong = random.random(len(clean.train_labels)) < share
    labels = np.where(wrong, random.integers(0, 10, len(wrong)), clean.train_labels).astype(np.uint8)
    return replace(clean, train_labels=labels)


def shard(classes: tuple[int, ...], share: float, seed: int) -> Digits:
    """Training images of which ``share`` are of these classes alone, and the others of all; as many as ever."""
    clean = digits()
    random = np.random.default_rng((seed, *classes))
    own = np.flatnonzero(np.isin(clean.train_labels, classes))
    num = len(clean.train_labels)
    chosen = np.where(random.random(num) < share, random.choice(own, num), random.permutation(num))
    return clean.chosen(chosen)


def few_images(num: int, seed: int) -> Digits:
    """The same ``num`` training images over and over; as many as ever."""
    clean = digits()
    size = len(clean.train_labels)
    chosen = np.resize(np.random.default_rng((seed, num)).choice(size, num, replace=False), size)
    return clean.chosen(chosen)


def other_validation(change: str, seed: int) -> Digits:
    """Validation images are ``dim`` (0.8 of their ink), ``inverted``, ``shifted`` by a pixel, or noise is added.

    ``noise`` has the standard deviation of all pixels, ``faint noise`` half of it; what it makes negative is 0. Pixels
    of 0 to 240, training ones too, so that rounding to whole numbers changes nothing that counts.
    """
    clean = digits()
    train, images = _FINER * clean.train_images, _FINER * clean.validation_images.astype(np.float64)
    match change:
        case "dim":
            changed = 0.8 * images
        case "inverted":
            changed = images.max() - images
        case "noise" | "faint noise":
            size = train.std() * (1.0 if change == "noise" else 0.5)
            changed = images + np.random.default_rng((seed, 11)).normal(0, size, images.shape)
        case "shifted":
            changed = np.pad(images, ((0, 0), (1, 0), (1, 0)))[:, :-1, :-1]
        case _:
            raise ValueError(f"unknown change {change!r}; known are dim, inverted, noise, faint noise, shifted")
    validation = changed.round().clip(0, 255).astype(np.uint8)
    return replace(clean, train_images=train, validation_images=validation)


def _idx(values: _Bytes) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()
