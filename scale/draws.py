"""Counter-based random draws: a number is a pure function of (seed, purpose, counters).

So every layout of ranks, every micro-batch size and every resumed run sees the same draws. ``data``
uses the NumPy form and ``model`` the torch form of one primitive; both live here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = 0xFFFFFFFFFFFFFFFF


def mix64(x: int) -> int:
    """Return the splitmix64 output for the 64-bit state ``x`` (Steele et al., OOPSLA 2014).

    Examples
    --------
    >>> hex(mix64(0))
    '0xe220a8397b1dcdaf'
    """
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * _MIX_1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX_2) & _MASK
    return x ^ (x >> 31)


def derive(seed: int, *words: int) -> int:
    """Return the key for one purpose: ``seed`` hashed with each word in turn.

    Examples
    --------
    >>> hex(derive(42, 1, 2, 3, 4))
    '0x4a90a635f990002d'
    """
    key = mix64(seed & _MASK)
    for word in words:
        key = mix64(key ^ (word & _MASK))
    return key


def mix64_array(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return :func:`mix64` of every element."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(_GOLDEN)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX_1)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX_2)
    return x ^ (x >> np.uint64(31))


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


def mix64_tensor(x: Tensor) -> Tensor:
    """Return :func:`mix64` of an int64 tensor, read and returned as 64 raw bits."""

    def shift_right(value: Tensor, bits: int) -> Tensor:
        # torch shifts int64 arithmetically; the mask drops the copies of the sign bit
        return (value >> bits) & ((1 << (64 - bits)) - 1)

    x = x + _signed(_GOLDEN)
    x = (x ^ shift_right(x, 30)) * _signed(_MIX_1)
    x = (x ^ shift_right(x, 27)) * _signed(_MIX_2)
    return x ^ shift_right(x, 31)


def uniform(index_B: Tensor, seed: int, purpose: int, draw: int = 0) -> Tensor:
    """Return one float32 in [0, 1) per index: a pure function of its arguments.

    The draw is made on the device of ``index_B`` and needs no synchronisation. It has 24 random
    bits, so that it is exact in float32 and never rounds to 1.
    """
    import torch

    key = _signed(derive(seed, purpose, draw))
    bits = mix64_tensor(mix64_tensor(index_B.to(torch.int64) ^ key))
    return ((bits >> 40) & 0xFFFFFF).to(torch.float32) / float(1 << 24)


def normal(index_B: Tensor, seed: int, purpose: int, shape: Sequence[int]) -> Tensor:
    """Return standard normal numbers [B, *shape]: a pure function of (index, place) and the key."""
    import torch

    place = torch.arange(math.prod(shape), device=index_B.device).view(1, *shape)
    index = mix64_tensor(index_B.to(torch.int64) ^ _signed(derive(seed, purpose)))
    bits = mix64_tensor(index.view(-1, *(1 for _ in shape)) ^ place)
    # Box and Muller, from two numbers of 24 bits; the first is never 0
    radius = ((((bits >> 40) & 0xFFFFFF) + 1).float() / (1 << 24)).log_().mul_(-2).sqrt_()
    return radius.mul_((((bits >> 16) & 0xFFFFFF).float() * (2 * math.pi / (1 << 24))).cos_())
