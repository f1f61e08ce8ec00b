from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from service.training.dataset import FASHION_MNIST_FOLDER, load_dataset
from service.training.idx import read_idx
from tests.service.training.idx_files import idx_bytes, write_data_set


def test_digits_are_split_into_four_fifths_and_one_fifth_of_every_class() -> None:
    digits = load_dataset("builtin:digits")
    assert digits.train_images.shape == (1437, 1, 8, 8)
    assert digits.validation_images.shape == (360, 1, 8, 8)
    assert digits.num_classes == 10
    train, validation = (labels.bincount() for labels in (digits.train_labels, digits.validation_labels))
    assert (validation / (train + validation)).numpy() == pytest.approx(np.full(10, 0.2), abs=0.005)


def test_digits_are_scikit_learns_each_in_one_of_the_two_parts() -> None:
    digits = load_dataset("builtin:digits")
    pixels, labels = load_digits(return_X_y=True)
    both = torch.cat([digits.train_images, digits.validation_images]).flatten(1).double().numpy()
    named = torch.cat([digits.train_labels, digits.validation_labels]).numpy()
    original = np.rint((both - both.min()) / np.ptp(both) * 16)  # the scale is undone by the extremes, 0 and 16
    ours = np.column_stack([original, named])
    theirs = np.column_stack([pixels, labels])
    assert sorted(map(tuple, ours)) == sorted(map(tuple, theirs))


def test_digits_are_the_same_every_time() -> None:
    first, second = load_dataset("builtin:digits"), load_dataset("builtin:digits")
    assert torch.equal(first.train_images, second.train_images)
    assert torch.equal(first.validation_labels, second.validation_labels)


def test_training_images_have_mean_zero_and_variance_one_and_validation_images_the_same_scale(tmp_path: Path) -> None:
    dataset = load_dataset(write_data_set(tmp_path))
    pixels = {part: read_idx(tmp_path / f"{part}-images-idx3-ubyte").astype(np.float64) for part in ("train", "t10k")}
    mean, std = pixels["train"].mean(), pixels["train"].std()
    for part, images in (("train", dataset.train_images), ("t10k", dataset.validation_images)):
        assert images.dtype == torch.float32
        np.testing.assert_allclose(images[:, 0].double(), (pixels[part] - mean) / std, rtol=0, atol=1e-6)
    assert dataset.num_classes == 3
    assert dataset.sample_shape == (1, 6, 6)


def test_gzipped_files_hold_the_same_images_as_plain_ones(tmp_path: Path) -> None:
    plain = load_dataset(write_data_set(tmp_path / "plain"))
    zipped = load_dataset(write_data_set(tmp_path / "zipped", zipped=True))
    assert torch.equal(plain.train_images, zipped.train_images)
    assert torch.equal(plain.validation_labels, zipped.validation_labels)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    uri = write_data_set(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither t10k-labels-idx1-ubyte nor t10k-labels-idx1-ubyte\.gz"):
        load_dataset(uri)


def test_a_missing_folder_is_named_with_the_place_it_must_be(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder on this worker"):
        load_dataset(f"idx:{tmp_path / 'nowhere'}")


def test_labels_that_do_not_match_their_images_are_refused(tmp_path: Path) -> None:
    uri = write_data_set(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(47, np.uint8)))
    with pytest.raises(ValueError, match=r"shape \(48, 6, 6\) and .* \(47,\)"):
        load_dataset(uri)


def test_images_of_one_colour_are_refused(tmp_path: Path) -> None:
    uri = write_data_set(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(np.full((48, 6, 6), 7, np.uint8)))
    with pytest.raises(ValueError, match="have the same value"):
        load_dataset(uri)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="known are builtin:digits, builtin:fashion-mnist, idx:/PATH"):
        load_dataset("builtin:imagenet")


@pytest.mark.skipif(FASHION_MNIST_FOLDER.is_dir(), reason="Debian's dataset-fashion-mnist is installed")
def test_missing_fashion_mnist_names_the_package_and_the_other_way() -> None:
    with pytest.raises(FileNotFoundError, match=r"package dataset-fashion-mnist, or give .* as idx:/PATH"):
        load_dataset("builtin:fashion-mnist")


@pytest.mark.skipif(not FASHION_MNIST_FOLDER.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_has_seventy_thousand_images_in_ten_equal_classes() -> None:
    fashion = load_dataset("builtin:fashion-mnist")
    assert fashion.train_images.shape == (60_000, 1, 28, 28)
    assert fashion.validation_images.shape == (10_000, 1, 28, 28)
    assert fashion.train_labels.bincount().tolist() == [6_000] * 10
