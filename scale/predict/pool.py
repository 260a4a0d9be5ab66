"""Which control cells a predicted condition starts from, in which order, and its other draws."""

from __future__ import annotations

from hashlib import sha256

import numpy as np
import numpy.typing as npt

from scale.draws import derive, mix64_array
from scale.predict.query import Controls, Request

POOL_ORDER = 21
"""Purpose of the draw that orders a pool of controls."""
OF_CONDITION = 22


def pool_rows(controls: Controls, request: Request, seed: int) -> npt.NDArray[np.int64]:
    """Rows of the control cells a condition starts from, in an order of its own."""
    usable = controls.obs["may_start"].to_numpy() & (
        controls.obs["cell_type"].to_numpy() == request.cell_type
    )
    if request.batch is not None:
        same_batch = usable & (controls.obs["batch"].to_numpy() == request.batch)
        usable = same_batch if same_batch.sum() >= 2 else usable
    rows = np.flatnonzero(usable)
    if len(rows) < 2:
        known = sorted(set(controls.obs["cell_type"]))
        raise ValueError(
            f"cell type {request.cell_type!r} has {len(rows)} control cells; at least 2 are "
            f"needed. Cell types with controls: {', '.join(known)}"
        )
    key = derive(seed, POOL_ORDER, _word(request))
    hashes = mix64_array(np.arange(len(rows), dtype=np.uint64) ^ np.uint64(key))
    return np.asarray(rows[np.argsort(hashes, kind="stable")], dtype=np.int64)


def condition_seed(request: Request, seed: int) -> int:
    """Return the seed of what the model draws for a condition: noise, counts."""
    return derive(seed, OF_CONDITION, _word(request))


def _word(request: Request) -> int:
    """Return a number for the names of a condition, whatever its place among the requests."""
    name = f"{request.cell_type}\n{request.batch}\n{request.perturbation.label}".encode()
    return int.from_bytes(sha256(name).digest()[:8], "big")


def set_sizes(pool_size: int, set_size: int, num_summary: int) -> tuple[int, int]:
    """Cells of a set and of its summary draw; a pool too small for both is divided."""
    if pool_size >= set_size + num_summary:
        return set_size, num_summary
    summary = max(1, pool_size * num_summary // (set_size + num_summary))
    return min(set_size, pool_size - summary), summary
