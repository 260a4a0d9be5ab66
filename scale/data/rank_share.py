"""Which sets each data-parallel rank reads in which step.

Megatron's "single" order: with c sets consumed, micro-step j of rank r of D reads the b sets from
c + (j D + r) b. A step thereby has the same sets whatever the number of ranks and the size of
micro-batches are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from scale.data.draws import Integers
from scale.types import PlanError


@dataclass(frozen=True, slots=True)
class RankShare:
    """The micro-batches of one rank.

    Parameters
    ----------
    rank, num_ranks
        Data-parallel rank and their number.
    num_micro_batches, sets_per_micro_batch
        What the rank reads in a step.

    Examples
    --------
    >>> share = RankShare.of(8, 2, rank=1, num_ranks=2)
    >>> jobs = share.micro_batches(consumed_sets=16)
    >>> [next(jobs).tolist() for _ in range(share.num_micro_batches)]
    [[18, 19], [22, 23]]
    """

    rank: int
    num_ranks: int
    num_micro_batches: int
    sets_per_micro_batch: int

    @classmethod
    def of(
        cls,
        sets_per_batch: int,
        sets_per_micro_batch: int | None,
        *,
        rank: int,
        num_ranks: int,
    ) -> RankShare:
        """Return a rank's share of ``sets_per_batch`` sets.

        Raises
        ------
        PlanError
            If the sizes do not divide.
        """
        share, rest = divmod(sets_per_batch, num_ranks)
        if rest or not share:
            raise PlanError(
                f"trainer.sets_per_batch ({sets_per_batch}) must be a multiple of the {num_ranks} "
                f"data-parallel ranks; use {max(share, 1) * num_ranks}"
            )
        size = sets_per_micro_batch or share
        if share % size:
            raise PlanError(
                f"trainer.sets_per_micro_batch ({size}) must divide the {share} sets that each of "
                f"{num_ranks} ranks has of trainer.sets_per_batch ({sets_per_batch})"
            )
        return cls(rank, num_ranks, share // size, size)

    def micro_batches(self, consumed_sets: int) -> Iterator[Integers]:
        """Yield the set numbers of each micro-batch, without end."""
        start = consumed_sets + self.rank * self.sets_per_micro_batch
        while True:
            yield np.arange(start, start + self.sets_per_micro_batch)
            start += self.num_ranks * self.sets_per_micro_batch


def run_of_batches(
    num_sets: int, sets_per_batch: int, *, rank: int, num_ranks: int
) -> Iterator[Integers]:
    """Yield the set numbers of a rank's batches, where every set is read once by one of the ranks.

    Ranks have neighbouring batches, as many as each other or one more; the last batch of all may be
    smaller.

    Examples
    --------
    >>> [batch.tolist() for batch in run_of_batches(7, 2, rank=1, num_ranks=2)]
    [[4, 5], [6]]
    """
    num_batches = -(-num_sets // sets_per_batch)
    for number in range(num_batches * rank // num_ranks, num_batches * (rank + 1) // num_ranks):
        first = number * sets_per_batch
        yield np.arange(first, min(first + sets_per_batch, num_sets))
