import gzip
from pathlib import Path

import numpy as np
import pytest

from service.training.idx import read_idx
from tests.service.training.idx_files import idx_bytes

IMAGES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


@pytest.mark.parametrize("zipped", [False, True])
def test_an_array_comes_back_as_it_was_written(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "any-name"
    path.write_bytes(gzip.compress(idx_bytes(IMAGES), mtime=0) if zipped else idx_bytes(IMAGES))
    assert np.array_equal(read_idx(path), IMAGES)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is not an IDX file"),
        (b"PNG and so on", "is not an IDX file"),
        (b"\0\0\x0d\x01\0\0\0\x01" + b"\0" * 4, "IDX type 0x0d"),
        (idx_bytes(IMAGES)[:9], "cut off inside its header, after 9 bytes"),
        (idx_bytes(IMAGES)[:-1], r"promises 24 values of shape \(2, 3, 4\) and holds 23"),
        (idx_bytes(IMAGES) + b"\0", "promises 24 values .* and holds 25"),
        (gzip.compress(idx_bytes(IMAGES), mtime=0)[:-9], "damaged gzip file"),
        (gzip.compress(idx_bytes(IMAGES), mtime=0)[:12] + b"\xff" * 20, "damaged gzip file"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=problem) as raised:
        read_idx(path)
    assert str(path) in str(raised.value)
