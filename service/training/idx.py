"""Reader of the IDX format in which MNIST and its kin are published."""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

_UNSIGNED_BYTE = 0x08


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """The array in an IDX file of unsigned bytes, read whole; gzip is recognized by its first bytes, not by name.

    Raises: FileNotFoundError if there is no file; ValueError if it is not such a file, or not whole.
    Source: the IDX description on the MNIST page: two zero bytes, type, number of dimensions, big-endian sizes.
    """
    content = _content(path)
    if len(content) < 4 or content[:2] != b"\0\0":
        raise ValueError(f"{path} is not an IDX file: it does not start with two zero bytes")
    if content[2] != _UNSIGNED_BYTE:
        raise ValueError(f"{path} holds values of IDX type 0x{content[2]:02x}; only unsigned bytes (0x08) are read")
    header_size = 4 + 4 * content[3]
    if len(content) < header_size:
        raise ValueError(f"{path} is cut off inside its header, after {len(content)} bytes; fetch it again")
    shape = struct.unpack(f">{content[3]}I", content[4:header_size])
    expected = int(np.prod(shape, dtype=np.int64))
    if len(content) - header_size != expected:
        raise ValueError(
            f"{path} promises {expected} values of shape {shape} and holds {len(content) - header_size}; "
            "it was cut off or overwritten, fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=header_size).reshape(shape)


def _content(path: Path) -> bytes:
    raw = path.read_bytes()
    if raw[:2] != b"\x1f\x8b":
        return raw
    try:
        return gzip.decompress(raw)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is a damaged gzip file ({error}); fetch it again") from error
