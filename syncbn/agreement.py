"""Agreement: every exchange opens with what the rank believes it is, so that a difference is an error that says so.

What it opens with is a number, because most exchanges agree and what is sent and compared costs all of them. The
texts behind the numbers are only sent where the numbers differ.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.errors import RanksDisagree

TEXT_SIZE = 32
"""Doubles for the text of an exchange: 256 bytes."""

_NUM_BYTES = TEXT_SIZE * 8
_DIGEST_BITS = 53  # every integer below 2 ** 53 is a double


class Exchange(NamedTuple):
    """What a rank means to exchange. Equal on all ranks, or the exchange is refused."""

    purpose: str
    """Such as ``forward`` or ``backward``."""
    layer: str = ""
    """Path of the layer in its model; "" if it has none."""
    num_channels: int = 0
    """Of the layer; 0 where no single layer is meant."""
    dtype: torch.dtype | None = None
    """Type of the layer's input."""
    num_values: int = 0
    """Of the vector, where it is not the layer that tells."""

    def __str__(self) -> str:
        if not self.num_channels:
            return f"{self.purpose} ({self.num_values} values)" if self.num_values else self.purpose
        layer = f"'{self.layer}'" if self.layer else "a layer without a name"
        return f"{self.purpose} of {layer} ({self.num_channels} channels, {_name_of(self.dtype)})"


@dataclass(frozen=True, eq=False)
class Digest:
    """A number for an exchange: equal for equal ones, and for different ones with a probability of about 1e-16."""

    number: float
    vector: Tensor
    """The same as ``(1,)`` double; to be read only, for it is made once."""


@lru_cache(maxsize=4096)
def digest_of(exchange: Exchange) -> Digest:
    """The number that opens the messages of ``exchange``."""
    hashed = blake2b(str(exchange).encode(), digest_size=8).digest()
    number = float(int.from_bytes(hashed, "big") >> (64 - _DIGEST_BITS))
    return Digest(number, torch.tensor([number], dtype=torch.float64))


def text_of(exchange: Exchange) -> Tensor:
    """The text of ``exchange`` as ``(TEXT_SIZE,)`` doubles, bit for bit.

    UTF-8 text makes neither NaN nor zero of a double, so that equal doubles are equal texts.
    """
    return torch.frombuffer(bytearray(_fitted(str(exchange)).ljust(_NUM_BYTES)), dtype=torch.float64)


def read_text(doubles: Tensor) -> str:
    """The text in these doubles, or a word for whatever came in its place."""
    text = bytes(doubles.contiguous().view(torch.uint8).tolist()).decode(errors="replace").rstrip()
    return text if text.isprintable() else "something that is no exchange of a SyncBatchNorm"


def disagreement(exchange: Exchange, texts: Mapping[int, str]) -> RanksDisagree:
    """The error for this rank's ``exchange`` where the ranks came with these ``texts``."""
    usual = _majority(list(texts.values()))
    differing = [rank for rank, text in texts.items() if text != usual]
    return RanksDisagree(
        f"the ranks do not mean the same exchange: {where_ranks_are(texts)}; every rank must run the same layers, "
        f"built alike, in the same order and mode, forward and backward",
        layer=exchange.layer,
        ranks=differing,
    )


def where_ranks_are(texts: Mapping[int, str]) -> str:
    """Such as ``rank 1 is at the forward of a; ranks 0 and 2 are at the forward of b``."""
    by_text: dict[str, list[int]] = {}
    for rank, text in sorted(texts.items()):
        by_text.setdefault(text, []).append(rank)
    return ", ".join(
        f"{name_ranks(ranks)} {'is' if len(ranks) == 1 else 'are'} at the {text}" for text, ranks in by_text.items()
    )


def name_ranks(ranks: Sequence[int]) -> str:
    """Such as ``rank 3`` or ``ranks 0, 1 and 2``."""
    *most, last = map(str, ranks)
    return f"ranks {', '.join(most)} and {last}" if most else f"rank {last}"


def _majority(texts: Sequence[str]) -> str | None:
    """What more ranks have than anything else, if there is such."""
    (text, most), *others = Counter(texts).most_common()
    return text if all(count < most for _, count in others) else None


def _name_of(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _fitted(text: str) -> bytes:
    """The text in at most `_NUM_BYTES` bytes; of a longer one both ends, with a checksum of all between."""
    encoded = text.encode()
    if len(encoded) <= _NUM_BYTES:
        return encoded
    middle = f"[{zlib.crc32(encoded):08x}]".encode()
    end = (_NUM_BYTES - len(middle)) // 2
    return encoded[:end] + middle + encoded[-end:]
