"""Scores of validation, whoever has read the sets."""

import pytest
import torch

from scale.tasks.validation import _SetScore, _Share, join

CONDITIONS = [3, 3, 3, 5, 7, 7, 7, 7, 7, 9, 9]


@pytest.fixture(scope="module")
def sets():
    """Return (condition, scores) of sets, in order."""
    generator = torch.Generator().manual_seed(0)

    def score():
        sums = [(torch.rand(12, generator=generator).double(), 4.0) for _ in range(4)]
        return _SetScore(float(torch.rand((), generator=generator)), sums)

    return [(number, score()) for number in CONDITIONS]


def share(sets):
    own = _Share()
    for number, told in sets:
        own.add(number, told)
    return own


def of_all_sets(sets):
    """Return the scores of each condition from all its sets at once."""
    found = []
    for number in dict.fromkeys(CONDITIONS):
        own = [told for n, told in sets if n == number]
        means = [sum(told.sums[k][0] for told in own) / (4.0 * len(own)) for k in range(4)]
        changes = torch.stack([means[0] - means[1], means[2] - means[3]])
        energy = sum(told.energy for told in own) / len(own)
        found.append((energy, float(torch.corrcoef(changes)[0, 1])))
    return found


@pytest.mark.parametrize("cuts", [[], [1], [3], [6], [2, 5, 6], [0, 4, 4, 11], list(range(11))])
def test_sets_that_are_shared_out_score_as_all_together(sets, cuts):
    ends = [0, *cuts, len(sets)]
    shares = [share(sets[a:b]) for a, b in zip(ends, ends[1:], strict=False)]
    found = join(shares)
    assert [pytest.approx(pair, rel=1e-12) for pair in of_all_sets(sets)] == found
