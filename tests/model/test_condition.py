"""The condition of a set: tables, combinations, doses, and what is hidden in training."""

import math
from dataclasses import replace

import pytest
import torch
from example_sets import DRUGS, batch, build, cells, features, shake, sizes, vocabulary

from scale.config import Fusion
from scale.model.condition import FEATURE_DROPOUT, ConditionEncoder, ConditionIds
from scale.types import ABSENT, UNKNOWN_COMPONENT

NAN = math.nan


def ids(components, doses, cell_types=(1,), batches=(1,)):
    return ConditionIds(
        torch.tensor(components),
        torch.tensor(doses),
        torch.tensor(cell_types),
        torch.tensor(batches),
    )


@pytest.fixture(scope="module")
def condition(alone):
    return shake(build().condition)


def modulation(condition, these, time=0.0):
    summary = cells(1, 16, seed=4)
    return condition(these, condition.perturbed(these), summary, torch.tensor([time]))


def test_order_of_components_does_not_matter(condition):
    one, two = ids([[2, 5]], [[0.1, NAN]]), ids([[5, 2]], [[NAN, 0.1]])
    torch.testing.assert_close(modulation(condition, one), modulation(condition, two))
    assert not torch.allclose(
        modulation(condition, one), modulation(condition, ids([[2, 5]], [[NAN, 0.1]]))
    )


def test_absent_components_change_nothing(condition):
    short, long = ids([[4]], [[2.0]]), ids([[4, ABSENT, ABSENT]], [[2.0, NAN, NAN]])
    torch.testing.assert_close(modulation(condition, short), modulation(condition, long))
    torch.testing.assert_close(condition.perturbed(short).sum_BD, condition.perturbed(long).sum_BD)


def test_without_dose_a_component_is_its_row_exactly(condition):
    row = condition.component_table[3]
    for dose in (NAN, 0.0, -1.0, math.inf):
        assert torch.equal(condition.perturbed(ids([[3]], [[dose]])).component_BJD[0, 0], row)
    assert not torch.allclose(condition.perturbed(ids([[3]], [[1.0]])).sum_BD[0], row)


def test_dose_starts_without_effect_and_is_continuous_after():
    fresh = build().condition
    assert torch.equal(
        fresh.perturbed(ids([[3]], [[10.0]])).sum_BD, fresh.perturbed(ids([[3]], [[NAN]])).sum_BD
    )
    condition = shake(fresh)
    low, near, far = (condition.perturbed(ids([[3]], [[d]])).sum_BD for d in (1.0, 1.01, 10.0))
    assert (near - low).norm() < 0.2 * (far - low).norm()


def test_missing_dose_leaves_gradients_finite(condition):
    condition.perturbed(ids([[3, 4]], [[NAN, 0.5]])).sum_BD.sum().backward()
    gradients = [p.grad for p in condition.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(g).all() for g in gradients)
    condition.zero_grad()


def test_every_fact_changes_the_modulation(condition):
    base = ids([[3, ABSENT]], [[1.0, NAN]])
    changed = [
        replace(base, component_BJ=torch.tensor([[4, ABSENT]])),
        replace(base, dose_BJ=torch.tensor([[2.0, NAN]])),
        replace(base, cell_type_B=torch.tensor([2])),
        replace(base, batch_B=torch.tensor([0])),
    ]
    reference = modulation(condition, base)
    for other in changed:
        assert not torch.allclose(modulation(condition, other), reference)
    assert not torch.allclose(modulation(condition, base, time=0.5), reference)


def test_unknown_cell_type_and_batch_take_the_null_row():
    known = ConditionIds.of(batch())
    unknown = batch().cell_type_B == ABSENT
    assert torch.equal(known.cell_type_B == 0, unknown)
    assert (known.cell_type_B[~unknown] == batch().cell_type_B[~unknown] + 1).all()


def test_null_perturbation_is_the_unknown_row_without_dose(condition):
    null = ids([[3, 4]], [[1.0, 2.0]]).without_perturbation()
    assert torch.equal(condition.perturbed(null).sum_BD[0], condition.component_table[0])


def test_what_is_hidden_depends_on_the_number_of_the_set():
    config = sizes(condition_dropout=0.1, cell_type_dropout=0.15, batch_dropout=0.5)
    n = 4000
    known = ids([[3, 4]] * n, [[1.0, NAN]] * n, [1] * n, [2] * n)
    index = torch.arange(n)
    dropped = known.dropped(config, index, seed=1, num_features=0)
    hidden = dropped.component_BJ[:, 0] == 0
    assert (dropped.component_BJ[hidden, 1] == ABSENT).all()
    assert dropped.dose_BJ[hidden].isnan().all()
    assert torch.equal(dropped.component_BJ[~hidden], known.component_BJ[~hidden])
    for share, expected in [
        (hidden, 0.1),
        (dropped.cell_type_B == 0, 0.15),
        (dropped.batch_B == 0, 0.5),
    ]:
        error = math.sqrt(expected * (1 - expected) / n)
        assert abs(share.float().mean().item() - expected) < 4 * error
    part = ids([[3, 4]] * 10, [[1.0, NAN]] * 10, [1] * 10, [2] * 10)
    again = part.dropped(config, index[500:510], seed=1, num_features=0)
    assert torch.equal(again.component_BJ, dropped.component_BJ[500:510])
    assert torch.equal(again.batch_B, dropped.batch_B[500:510])


def test_nothing_is_hidden_at_zero():
    config = sizes(condition_dropout=0.0, cell_type_dropout=0.0, batch_dropout=0.0)
    known = ids([[3, 4]], [[1.0, NAN]])
    assert known.dropped(config, torch.arange(1), seed=1, num_features=0) is known


# --- features -------------------------------------------------------------------------------------

WITHOUT = len(DRUGS) + 1
"""Row of a drug that has no features."""
NEW = len(DRUGS) + 2
"""First row of what is known by features alone."""


@pytest.fixture(scope="module")
def featured(alone):
    return shake(build(with_features=True).condition)


def vectors(condition, components, doses=None):
    doses = [[NAN] * len(components)] if doses is None else doses
    return condition.perturbed(ids([components], doses))


def test_a_name_is_its_row_and_its_features(featured):
    mapped = featured.features.outer(
        torch.nn.functional.silu(featured.features.inner(features()[[3, NEW]]))
    )
    table = featured.component_table
    torch.testing.assert_close(vectors(featured, [3]).sum_BD[0], table[3] + mapped[0])
    torch.testing.assert_close(
        vectors(featured, [NEW]).sum_BD[0], table[UNKNOWN_COMPONENT] + mapped[1]
    )


@pytest.mark.parametrize("row", [0, 1, WITHOUT])
def test_without_features_a_name_is_its_row_exactly(featured, row):
    assert torch.equal(vectors(featured, [row]).sum_BD[0], featured.component_table[row])
    hidden = replace(ids([[row]], [[NAN]]), hidden_BJ=torch.tensor([[True]]))
    assert torch.equal(featured.perturbed(hidden).sum_BD[0], featured.component_table[row])


def test_a_hidden_name_leaves_its_features(featured):
    known = ids([[3, WITHOUT, ABSENT]], [[NAN, NAN, NAN]])
    hidden = featured.perturbed(replace(known, hidden_BJ=torch.tensor([[True, True, True]])))
    expected = featured.perturbed(known).component_BJD.clone()
    table = featured.component_table
    expected[0, 0] += table[UNKNOWN_COMPONENT] - table[3]
    torch.testing.assert_close(hidden.component_BJD, expected)


def test_new_names_add_up_in_any_order_and_take_doses(featured):
    one, two = ids([[3, NEW]], [[NAN, 2.0]]), ids([[NEW, 3]], [[2.0, NAN]])
    torch.testing.assert_close(modulation(featured, one), modulation(featured, two))
    apart = [vectors(featured, [3]), vectors(featured, [NEW], [[2.0]])]
    both = featured.perturbed(one).sum_BD
    torch.testing.assert_close(both, apart[0].sum_BD + apart[1].sum_BD)
    assert not torch.allclose(apart[1].sum_BD, vectors(featured, [NEW]).sum_BD)


def test_features_start_as_large_as_a_row_of_the_table(alone):
    fresh = build(sizes(hidden_size=64), with_features=True).condition
    mapped, _ = fresh.features(torch.arange(2, WITHOUT), None)
    assert 0.3 < mapped.std().item() < 3


def test_names_and_numbers_are_hidden_by_set_and_component():
    config, n = sizes(condition_dropout=0.0, identity_dropout=0.3), 4000
    known = ids([[3, 4]] * n, [[1.0, NAN]] * n, [1] * n, [2] * n)
    index = torch.arange(n)
    drawn = known.dropped(config, index, seed=1, num_features=7)
    for draw, expected in ((drawn.hidden_BJ, 0.3), (drawn.kept_BJV, 1 - FEATURE_DROPOUT)):
        error = math.sqrt(expected * (1 - expected) / n)
        assert ((draw.float().mean(0) - expected).abs() < 4 * error).all()
        assert (draw.all(1).float().mean(0) - expected**2).abs().max() < 0.03  # each by itself
    assert (drawn.kept_BJV[..., 1:] != drawn.kept_BJV[..., :-1]).any(0).all()
    part = ids([[3, 4]] * 10, [[1.0, NAN]] * 10, [1] * 10, [2] * 10)
    again = part.dropped(config, index[500:510], seed=1, num_features=7)
    assert torch.equal(again.hidden_BJ, drawn.hidden_BJ[500:510])
    assert torch.equal(again.kept_BJV, drawn.kept_BJV[500:510])
    nothing = known.dropped(config, index, seed=1, num_features=0)
    assert (nothing.hidden_BJ, nothing.kept_BJV) == (None, None)


def test_what_is_seen_of_a_feature_counts_for_the_rest(featured):
    known = ids([[3, WITHOUT]], [[NAN, NAN]])
    kept = torch.arange(7).expand(1, 2, 7) % 2 == 0
    seen = featured.perturbed(replace(known, kept_BJV=kept)).component_BJD[0]
    feature = features()[3] * kept[0, 0] / (1 - FEATURE_DROPOUT)
    mapped = featured.features.outer(torch.nn.functional.silu(featured.features.inner(feature)))
    torch.testing.assert_close(seen[0], featured.component_table[3] + mapped)
    assert torch.equal(seen[1], featured.component_table[WITHOUT])


# --- fusion ---------------------------------------------------------------------------------------


def test_the_sum_of_the_tokens_in_place_of_the_seed(alone):
    condition = shake(ConditionEncoder(sizes(fusion=Fusion.sum), vocabulary()))
    these, summary = ids([[3, 4, ABSENT]], [[1.0, NAN, NAN]]), cells(1, 16, seed=4)
    perturbed = condition.perturbed(these)
    facts = condition.cell_type_table[1] + condition.batch_table[1] + summary
    waves = torch.outer(torch.tensor([500.0]), condition.time_frequency_F)
    time = condition.time(torch.cat([waves.sin(), waves.cos()], -1))
    token = torch.nn.functional.silu(perturbed.sum_BD + facts + time)
    expected = condition.modulation(token).view(1, 6, -1)
    torch.testing.assert_close(
        condition(these, perturbed, summary, torch.tensor([0.5])), expected, rtol=1e-4, atol=1e-4
    )
    assert not {"seed_1D", "query.weight"} & set(dict(condition.named_parameters()))
