"""The images a job trains and is judged on, by the name its spec gives them."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from service.training.idx import read_idx

FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the four files."""
_SPLIT_SEED = 0
_VALIDATION_EVERY = 5


@dataclass(frozen=True)
class Dataset:
    """Training and validation images in memory.

    Images are float ``(N, C, H, W)``, shifted and scaled per channel so that the training images have mean 0 and
    variance 1; labels are int64 ``(N,)`` in ``0..num_classes - 1``.
    """

    train_images: Tensor
    train_labels: Tensor
    validation_images: Tensor
    validation_labels: Tensor
    num_classes: int

    @property
    def sample_shape(self) -> torch.Size:
        """Shape of one image, ``(C, H, W)``."""
        return self.train_images.shape[1:]

    def to(self, device: torch.device, dtype: torch.dtype) -> "Dataset":
        """The same images as ``dtype`` on ``device``."""
        return Dataset(
            self.train_images.to(device, dtype),
            self.train_labels.to(device),
            self.validation_images.to(device, dtype),
            self.validation_labels.to(device),
            self.num_classes,
        )


def load_dataset(uri: str) -> Dataset:
    """The data set that ``uri`` names, as float32 on the CPU; the same on every rank and for every seed.

    ``builtin:digits``: scikit-learn's 1,797 digits of 8x8, a fixed fifth of each class for validation.
    ``builtin:fashion-mnist``: 60,000 and 10,000 images of 28x28 from Debian's package dataset-fashion-mnist.
    ``idx:/PATH``: a folder with the four files of MNIST, plain or gzipped.

    Raises: FileNotFoundError if the files are not there, ImportError if scikit-learn is not; ValueError if the
        files are not what they should be, or the name is unknown.
    """
    scheme, _, rest = uri.partition(":")
    if uri == "builtin:digits":
        return _digits()
    if uri == "builtin:fashion-mnist":
        return _fashion_mnist()
    if scheme == "idx" and rest:
        return _idx_folder(Path(rest))
    raise ValueError(f"unknown data set {uri!r}; known are builtin:digits, builtin:fashion-mnist, idx:/PATH")


def _digits() -> Dataset:
    # Read from scikit-learn's own file: importing the package would cost each rank 0.75 s more before its first step.
    package = find_spec("sklearn")
    if package is None or not package.submodule_search_locations:
        raise ImportError("builtin:digits comes with scikit-learn; install syncbn[data] on the workers")
    table = np.loadtxt(Path(package.submodule_search_locations[0]) / "datasets/data/digits.csv.gz", delimiter=",")
    images, labels = table[:, :-1].reshape(-1, 1, 8, 8), table[:, -1].astype(np.int64)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # by class, at random within it
    is_validation = np.zeros(len(labels), dtype=bool)
    is_validation[order[::_VALIDATION_EVERY]] = True
    return _normalized(images[~is_validation], labels[~is_validation], images[is_validation], labels[is_validation])


def _fashion_mnist() -> Dataset:
    if not FASHION_MNIST_FOLDER.is_dir():
        raise FileNotFoundError(
            f"{FASHION_MNIST_FOLDER} does not exist on this worker; install Debian's package dataset-fashion-mnist, "
            "or give the folder of the four files as idx:/PATH"
        )
    return _idx_folder(FASHION_MNIST_FOLDER)


def _idx_folder(folder: Path) -> Dataset:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder on this worker; idx:/PATH must be there on every worker")
    train_x, train_y = _images_and_labels(folder, "train")
    validation_x, validation_y = _images_and_labels(folder, "t10k")
    if train_x.shape[1:] != validation_x.shape[1:]:
        raise ValueError(f"training images are {train_x.shape[1:]}, validation images {validation_x.shape[1:]}")
    return _normalized(train_x, train_y, validation_x, validation_y)


def _images_and_labels(folder: Path, part: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    images_path = _find(folder, f"{part}-images-idx3-ubyte")
    labels_path = _find(folder, f"{part}-labels-idx1-ubyte")
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or len(images) == 0:
        raise ValueError(
            f"{images_path} has shape {images.shape} and {labels_path} {labels.shape}; "
            "expected (N, H, W) and (N,) with the same N above 0"
        )
    return images[:, None], labels


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder} holds neither {name} nor {name}.gz")


def _normalized(
    train_x: npt.NDArray[np.generic],
    train_y: npt.NDArray[np.generic],
    validation_x: npt.NDArray[np.generic],
    validation_y: npt.NDArray[np.generic],
) -> Dataset:
    mean = train_x.mean(axis=(0, 2, 3), keepdims=True, dtype=np.float64)
    std = train_x.std(axis=(0, 2, 3), keepdims=True, dtype=np.float64)
    if not (std > 0).all():
        raise ValueError("all pixels of the training images have the same value")
    return Dataset(
        _standardized(train_x, mean, std),
        torch.from_numpy(train_y.astype(np.int64)),
        _standardized(validation_x, mean, std),
        torch.from_numpy(validation_y.astype(np.int64)),
        num_classes=int(max(train_y.max(), validation_y.max())) + 1,
    )


def _standardized(
    images: npt.NDArray[np.generic], mean: npt.NDArray[np.float64], std: npt.NDArray[np.float64]
) -> Tensor:
    # One float32 copy, worked on in place: a float64 one of Fashion-MNIST would take 376 MB on every rank.
    pixels = images.astype(np.float32)
    pixels -= mean.astype(np.float32)
    pixels /= std.astype(np.float32)
    return torch.from_numpy(pixels)
