"""Who multiplies fp32 matrices on a CPU: oneDNN where it loses no bits, a tenth faster than MKL.

At 512 cells by the sizes of the set blocks, one thread of an AVX-512 machine: MKL 99-103, oneDNN
109-114 GFLOP/s. Torch hands fp32 products to oneDNN only where it is told that products in bf16
would do. Most machines have no such kernel for fp32 matrices and multiply in fp32; those that have
one (AMX) are recognised by the error of a product, and left with MKL.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_LARGEST_ERROR = 1e-5
"""Of a product of 256 terms, relative to its largest entry: 1e-7 in fp32, 1e-3 in bf16."""


_mkldnn: Any = torch.backends.mkldnn
_before: list[str] = []
"""What torch was told before, while oneDNN multiplies."""


def use_onednn() -> None:
    """Let oneDNN multiply fp32 matrices on the CPU, if that is exact here."""
    if _before or not _can_be_told():
        return
    before = _mkldnn.matmul.fp32_precision
    _mkldnn.matmul.fp32_precision = "bf16"
    if _is_exact():
        _before.append(before)
    else:
        _mkldnn.matmul.fp32_precision = before


def stop_onednn() -> None:
    """Tell torch what it was told before."""
    while _before:
        _mkldnn.matmul.fp32_precision = _before.pop()


def is_onednn() -> bool:
    """Return whether fp32 products on the CPU are oneDNN's."""
    return bool(_before)


@contextmanager
def by_mkl() -> Iterator[None]:
    """Leave products to MKL for a ``with`` block: oneDNN is slow with many small ones."""
    if not _before:
        yield
        return
    _mkldnn.matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        _mkldnn.matmul.fp32_precision = "bf16"


def _can_be_told() -> bool:
    matmul = getattr(_mkldnn, "matmul", None)
    return bool(_mkldnn.is_available()) and hasattr(matmul, "fp32_precision")


def _is_exact() -> bool:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    error = (a @ b - exact).abs().max() / exact.abs().max()
    return float(error) < _LARGEST_ERROR
