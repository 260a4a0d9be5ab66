"""What makes a training step on a CPU fast: freed memory is kept, and oneDNN multiplies matrices.

Torch takes its fp32 products from MKL, whose kernels for other makers' processors are a tenth to a
fifth slower than oneDNN's. It asks oneDNN only where products may be done in bf16, and oneDNN makes
use of that on processors with matrix units (AMX) alone. So it is asked where it keeps all bits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from scale.runtime import keep_freed_memory

logger = logging.getLogger(__name__)


@contextmanager
def fast_steps(device: torch.device) -> Iterator[None]:
    """Set this process up for training on ``device``; does nothing where it is not a CPU."""
    if device.type != "cpu":
        yield
        return
    keep_freed_memory()
    with onednn_products():
        yield


@contextmanager
def onednn_products() -> Iterator[None]:
    """Take fp32 products from oneDNN, if this torch can be told so and no bit is lost."""
    # since torch 2.9
    settings: Any = getattr(torch.backends.mkldnn, "matmul", None)
    before = getattr(settings, "fp32_precision", None)
    if before is None:
        yield
        return
    settings.fp32_precision = "bf16"
    try:
        if keeps_all_bits():
            logger.info("fp32 products: oneDNN (no bf16 inside on this processor)")
        else:
            settings.fp32_precision = before
        yield
    finally:
        settings.fp32_precision = before


def keeps_all_bits() -> bool:
    """Return whether products of float32 matrices are float32 inside."""
    # 1 + 2^-20 has bits that neither bf16 nor TF32 has; with the identity the product is exact.
    size = 64
    value = torch.full((size, size), 1.0 + 2.0**-20)
    return torch.equal(value @ torch.eye(size), value)
