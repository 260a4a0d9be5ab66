"""Where each cell goes: buckets that fit the memory, shards made of buckets, order in a condition.

A stream cut every 64 cells would make chunks of neighbours in the file: same well, same
sub-library. So cells are put into the order of (condition, keyed hash of their number, number)
before they are cut. Sorting goes by *buckets*: stretches of that order, planned from the labels
alone, each small enough for memory. A condition too large for one bucket has several, by ranges of
the hash.

Shapes: N = cells, C = conditions, K = buckets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scale.draws import derive, mix64_array
from scale.types import Condition

_SHUFFLE = 0x5348
"""Word of the key that orders the cells of a condition."""


@dataclass(frozen=True, slots=True)
class Buckets:
    """The plan of the buckets, in the order of the store.

    Parameters
    ----------
    key
        Of the hash that orders the cells of a condition.
    first_C, num_C
        First bucket of each condition and how many it has to itself; -1 and 0 where its cells are
        not wanted. Small conditions share a bucket.
    num_buckets
        Number of buckets, K.
    """

    key: int
    first_C: npt.NDArray[np.int32]
    num_C: npt.NDArray[np.int32]
    num_buckets: int

    @classmethod
    def plan(
        cls,
        conditions: Sequence[Condition],
        num_cells_C: npt.NDArray[np.int64],
        is_wanted_C: npt.NDArray[np.bool_],
        *,
        cells_per_bucket: int,
        seed: int,
    ) -> Buckets:
        """Return buckets of at most about ``cells_per_bucket`` cells.

        Parameters
        ----------
        conditions
            In the order of the store.
        num_cells_C
            Most cells that each may have.
        is_wanted_C
            Which of them are stored.
        cells_per_bucket
            Size that a bucket should not exceed.
        seed
            Of the order of cells within a condition.
        """
        first_C = np.full(len(conditions), -1, np.int32)
        num_C = np.zeros(len(conditions), np.int32)
        end, room, kind = 0, 0, None
        for c in np.flatnonzero(is_wanted_C).tolist():
            size = int(num_cells_C[c])
            own = (conditions[c].is_control, conditions[c].cell_type)
            if size > cells_per_bucket:
                first_C[c], num_C[c] = end, -(-size // cells_per_bucket)
                end, room = end + int(num_C[c]), 0
                continue
            if size > room or own != kind:
                end, room, kind = end + 1, cells_per_bucket, own
            first_C[c], num_C[c] = end - 1, 1
            room -= size
        return cls(derive(seed, _SHUFFLE), first_C, num_C, end)

    def hashes(self, ordinal_N: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """Return the number that orders each cell within its condition."""
        return mix64_array(ordinal_N ^ np.uint64(self.key))

    def of(
        self, condition_N: npt.NDArray[np.int32], ordinal_N: npt.NDArray[np.uint64]
    ) -> npt.NDArray[np.int32]:
        """Return the bucket of each cell; all of them must be wanted."""
        bucket_N = self.first_C[condition_N]
        num_N = self.num_C[condition_N]
        split = np.flatnonzero(num_N > 1)
        if len(split):
            high = self.hashes(ordinal_N[split]) >> np.uint64(32)
            part = (high * num_N[split].astype(np.uint64)) >> np.uint64(32)
            bucket_N[split] += part.astype(np.int32)
        return bucket_N

    def order(
        self, condition_N: npt.NDArray[np.int32], ordinal_N: npt.NDArray[np.uint64]
    ) -> npt.NDArray[np.int64]:
        """Return the permutation that puts cells into the order in which they are stored."""
        return np.lexsort((ordinal_N, self.hashes(ordinal_N), condition_N))


def plan_shards(
    buckets: Buckets, conditions: Sequence[Condition], bytes_K: npt.NDArray[np.int64], limit: int
) -> list[range]:
    """Return the buckets that are written together, so that shards are nearly full.

    Buckets of one condition stay together, whatever their size; controls and treated cells, and
    the treated cells of different cell types, are kept apart. Empty buckets are left out where
    nothing else would be written with them.

    Parameters
    ----------
    buckets, conditions
        The plan, and what it is about.
    bytes_K
        Size of the cells in each bucket before compression.
    limit
        Bytes that a group should not exceed.
    """
    groups: list[range] = []
    kind: tuple[bool, str] | None = None
    wanted = np.flatnonzero(buckets.first_C >= 0)
    firsts, at = np.unique(buckets.first_C[wanted], return_index=True)
    stops = np.append(firsts[1:], buckets.num_buckets)
    for first, stop, c in zip(firsts.tolist(), stops.tolist(), wanted[at].tolist(), strict=True):
        size = int(bytes_K[first:stop].sum())
        own = (conditions[c].is_control, conditions[c].cell_type)
        before = groups[-1] if groups else range(0)
        filled = int(bytes_K[before.start : before.stop].sum())
        if not size:
            continue
        if own == kind and filled + size <= limit:
            groups[-1] = range(before.start, stop)
        else:
            groups.append(range(first, stop))
        kind = own
    return groups
