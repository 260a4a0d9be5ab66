"""Laws of the plan, against references in plain Python that follow the design word by word."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from scale.config import DataConfig, MatchBatch, ShortSets, Weighting
from scale.data import draws
from scale.data.sampler import SetPlan, keyed_order, permute
from scale.draws import derive, mix64
from scale.types import PlanError

NONE_TAKEN = np.empty(0, np.int64)
CONFIG = DataConfig(store="unused")


# --- references ---------------------------------------------------------------------------------


def reference_order(n, key):
    """0..n-1 by hash up to 4,096, else through the Feistel network."""
    if n <= 4096:
        return sorted(range(n), key=lambda i: mix64(key ^ i))
    return [reference_permute(i, n, key) for i in range(n)]


def reference_permute(i, n, key):
    bits = max(2, (n - 1).bit_length())
    low, high, x = bits // 2, bits - bits // 2, i
    while True:
        for turn in range(8):
            right, left = x & (1 << low) - 1, x >> low
            left ^= mix64(key ^ turn << 56 ^ right) & (1 << high) - 1
            x = right << high | left
            low, high = high, low
        if x < n:
            return x


def reference_circle(n, first_slot, key, wanted):
    """Walk the circle of slots one by one."""
    num_chunks = -(-n // 64)
    slots = []
    for chunk in reference_order(num_chunks, key):
        present = min(64, n - 64 * chunk)
        inner = reference_order(present, mix64(key ^ 0xC0FFEE ^ chunk << 32))
        slots += [(chunk, inner[i]) if i < present else None for i in range(64)]
    walk = [s for s in slots[first_slot:] + slots[:first_slot] if s is not None][:wanted]
    # a whole chunk is taken as it is
    rows = []
    position = 0
    while position < len(walk):
        chunk = walk[position][0]
        end = position
        while end < len(walk) and walk[end][0] == chunk:
            end += 1
        run = [row for _, row in walk[position:end]]
        if len(run) == min(64, n - 64 * chunk):
            run = sorted(run)
        rows += [64 * chunk + row for row in run]
        position = end
    return rows


def circle(n, first_slot, key, wanted):
    rows = np.empty(wanted, np.int64)
    draws.cells_on_circle(n, first_slot, np.uint64(key), rows)
    return rows


def grid(num_cell_types=3, num_batches=2, num_drugs=6, seed=0, control_cells=(150, 20)):
    """Conditions of every size between 5 and 400; one small control pool per second batch."""
    generator = np.random.default_rng(seed)
    rows = []
    for c in range(num_cell_types):
        for b in range(num_batches):
            size = control_cells[(c * num_batches + b) % len(control_cells)]
            rows.append((f"line{c}", f"plate{b}", True, size))
            rows += [
                (f"line{c}", f"plate{b}", False, int(generator.integers(5, 400)))
                for _ in range(num_drugs)
            ]
    return pd.DataFrame(rows, columns=["cell_type", "batch", "is_control", "num_cells"])


def make_plan(conditions=None, config=CONFIG, *, set_size=64, num_summary_cells=32, **changes):
    conditions = grid() if conditions is None else conditions
    is_control = conditions["is_control"].to_numpy()
    options = {"seed": 7, **changes}
    return SetPlan(
        conditions,
        np.flatnonzero(~is_control),
        np.flatnonzero(is_control),
        config,
        set_size=set_size,
        num_summary_cells=num_summary_cells,
        **options,
    )


def epoch_of(plan, epoch=0):
    length = plan.num_sets_per_epoch
    return [plan.plan(epoch, index) for index in range(length)]


def pairs(condition, row):
    return set(zip(condition.tolist(), row.tolist(), strict=True))


# --- primitives ---------------------------------------------------------------------------------


def test_golden_values():
    # other values are another order of every run: plan_version would have to change
    assert mix64(0) == 0xE220A8397B1DCDAF
    assert derive(42, 1, 2, 3, 4) == 0x4A90A635F990002D
    assert keyed_order(8, 42).tolist() == [3, 2, 5, 1, 4, 0, 7, 6]
    assert [permute(i, 10000, 42) for i in range(5)] == [7203, 4038, 3770, 5915, 5257]


@given(st.integers(0, 2**64 - 1))
@hypothesis_settings(max_examples=50, deadline=None)
def test_compiled_hashes_equal_those_of_runtime(x):
    assert int(draws.mix(np.uint64(x))) == mix64(x)
    assert int(draws.derive_key(np.uint64(x), 3, 5, 7, 11)) == derive(x, 3, 5, 7, 11)


@pytest.mark.parametrize("n", [1, 2, 3, 64, 1000, 4096])
def test_keyed_order_is_the_stable_sort_of_hashes(n):
    for key in (0, 42, 2**64 - 1):
        assert keyed_order(n, key).tolist() == reference_order(n, key)


@pytest.mark.parametrize("n", [4097, 5000, 8192, 8193])
def test_permute_is_a_bijection_and_equals_its_reference(n):
    image = draws.feistel_many(np.arange(n), n, np.uint64(9))
    assert sorted(image.tolist()) == list(range(n))
    assert image[:50].tolist() == [reference_permute(i, n, 9) for i in range(50)]


def test_keyed_order_refuses_what_would_be_slow():
    with pytest.raises(ValueError, match="above 4096 use permute"):
        keyed_order(4097, 0)


@pytest.mark.parametrize("n", [3, 17, 5000])
def test_first_places_are_uniform(n):
    num_draws = 20_000
    first = np.empty((num_draws, 1), np.int64)
    for key in range(num_draws):
        draws.draw_distinct(n, np.uint64(mix64(key)), NONE_TAKEN, first[key])
    bins = min(n, 50)
    observed = np.bincount(first[:, 0] * bins // n, minlength=bins)
    expected = np.bincount(np.arange(n) * bins // n, minlength=bins) * num_draws / n
    chi2 = ((observed - expected) ** 2 / expected).sum()
    # mean of chi2 is its degrees of freedom, its variance twice that: five deviations
    assert chi2 < (bins - 1) + 5 * np.sqrt(2 * (bins - 1))


@pytest.mark.parametrize("n", [20, 300, 3000, 4096, 4097])
@pytest.mark.parametrize("num_taken", [0, 13])
def test_draws_are_the_first_of_an_order_that_are_not_taken(n, num_taken):
    for key in (1, 2**63 + 5):
        taken = np.array(reference_order(n, 77)[:num_taken], np.int64)
        out = np.empty(min(200, n - num_taken), np.int64)
        draws.draw_distinct(n, np.uint64(key), taken, out)
        order = [i for i in reference_order(n, key) if i not in set(taken.tolist())]
        assert out.tolist() == order[: len(out)]


# --- cells of a set -----------------------------------------------------------------------------


def test_cells_on_the_circle_equal_their_reference():
    generator = np.random.default_rng(0)
    for _ in range(150):
        n, size = int(generator.integers(1, 700)), int(generator.integers(2, 300))
        passes = max(1, round(n / size))
        q, key = int(generator.integers(passes)), int(generator.integers(2**62))
        wanted = min(size, n)
        expected = reference_circle(n, q * size, key, wanted)
        assert circle(n, q * size, key, wanted).tolist() == expected


def test_no_cell_twice_in_a_set_and_seldom_in_a_pass():
    generator = np.random.default_rng(1)
    most = {16: 5, 32: 3, 64: 2, 128: 2, 256: 2, 300: 2}
    for size, bound in most.items():
        for n in generator.integers(1, 2000, 60).tolist():
            passes = max(1, round(n / size))
            uses = np.zeros(n, np.int64)
            for q in range(passes):
                rows = circle(n, q * size, 5 * n, min(size, n))
                assert len(set(rows.tolist())) == len(rows) == min(size, n)
                uses[rows] += 1
            assert uses.max() <= bound


# The start of a set is a slot, and the ragged chunk has holes: where a condition has two or three
# chunks, cells of the ragged one are used less often.
@pytest.mark.parametrize(
    ("n", "size", "bound"), [(1278, 256, 0.13), (2000, 64, 0.13), (150, 64, 0.2), (97, 64, 0.25)]
)
def test_cells_are_used_evenly_over_passes(n, size, bound):
    uses = np.zeros(n, np.int64)
    passes = max(1, round(n / size))
    for number in range(400):
        for q in range(passes):
            uses[circle(n, q * size, mix64(number), min(size, n))] += 1
    assert np.abs(uses / uses.mean() - 1).max() < bound


# --- sets of an epoch ---------------------------------------------------------------------------


def test_every_slot_once_per_epoch_and_length_from_the_cells():
    conditions = grid()
    plan = make_plan(conditions)
    treated = conditions[~conditions["is_control"]]["num_cells"]
    wanted = {c: max(1, round(n / 64)) for c, n in treated.items()}
    for epoch in (0, 3):
        found = Counter(spec.condition for spec in epoch_of(plan, epoch))
        assert found == wanted
    assert plan.num_sets_per_epoch == sum(wanted.values())


def test_sets_are_those_of_the_design():
    conditions = grid()
    plan = make_plan(conditions)
    length, seed = plan.num_sets_per_epoch, 7
    targets = np.flatnonzero(~conditions["is_control"])
    slots = [
        (c, r)
        for c in targets.tolist()
        for r in range(max(1, round(conditions["num_cells"][c] / 64)))
    ]
    for epoch in (0, 2):
        order = reference_order(length, derive(seed, 1, epoch))
        for index in range(0, length, 5):
            spec = plan.plan(epoch, index)
            c, r = slots[order[index]]
            n = int(conditions["num_cells"][c])
            passes = max(1, round(n / 64))
            key = derive(seed, 2, epoch, c, r // passes)
            assert spec.condition == c
            assert spec.treated_row.tolist() == reference_circle(
                n, r % passes * 64, key, min(64, n)
            )
            own = conditions.loc[c]
            same = conditions["is_control"] & (conditions["cell_type"] == own["cell_type"])
            if conditions["num_cells"][same & (conditions["batch"] == own["batch"])].sum() >= 32:
                same &= conditions["batch"] == own["batch"]
            cells = [(m, i) for m in np.flatnonzero(same) for i in range(conditions.num_cells[m])]
            drawn = reference_order(len(cells), derive(seed, 3, epoch, c, r))[:64]
            second = reference_order(len(cells), derive(seed, 4, epoch, c, r))
            second = [i for i in second if i not in drawn][:32]
            found = zip(spec.control_condition, spec.control_row, strict=True)
            assert list(found) == [cells[i] for i in drawn]
            found = zip(spec.summary_condition, spec.summary_row, strict=True)
            assert list(found) == [cells[i] for i in second]


def test_long_epochs_are_permuted_too():
    conditions = pd.DataFrame(
        {"cell_type": "a", "batch": None, "is_control": [True, False], "num_cells": [50, 40_000]}
    )
    plan = make_plan(conditions, set_size=8, num_summary_cells=2)
    assert plan.num_sets_per_epoch == 5000
    for epoch in (0, 1):
        block = plan.block(epoch * 5000 + np.arange(5000))
        uses = np.bincount(block.treated_row_BS.ravel(), minlength=40_000)
        assert (uses == 1).all()  # 8 divides 64 and 64 divides 40,000


def test_weighting():
    conditions = grid()
    cells = conditions["num_cells"][~conditions["is_control"]].to_numpy()
    total = np.maximum(1, np.rint(cells / 64)).sum()
    for weighting, exponent in ((Weighting.sqrt, 0.5), (Weighting.conditions, 0.0)):
        plan = make_plan(conditions, replace(CONFIG, weighting=weighting))
        found = Counter(spec.condition for spec in epoch_of(plan))
        share = total * cells**exponent / (cells**exponent).sum()
        assert [found[c] for c in sorted(found)] == np.maximum(1, np.floor(share + 0.5)).tolist()


def test_every_cell_is_trained_on_within_some_epochs():
    conditions = grid()
    for weighting in Weighting:
        plan = make_plan(conditions, replace(CONFIG, weighting=weighting))
        seen = set()
        for epoch in range(40):
            block = plan.block(epoch * plan.num_sets_per_epoch + np.arange(plan.num_sets_per_epoch))
            for b, rows in enumerate(block.treated_row_BS):
                seen |= {(block.condition_B[b], row) for row in rows[rows >= 0].tolist()}
        assert len(seen) == conditions["num_cells"][~conditions["is_control"]].sum()


def test_epochs_and_seeds_differ_and_nothing_else_matters():
    plan, again = make_plan(), make_plan()
    length = plan.num_sets_per_epoch
    numbers = np.arange(3 * length)
    whole = plan.block(numbers)
    for start, stop in ((0, 1), (length - 3, length + 4), (2 * length, 3 * length)):
        part = again.block(numbers[start:stop])
        for name in whole.__slots__:
            np.testing.assert_array_equal(getattr(whole, name)[start:stop], getattr(part, name))
    orders = whole.condition_B.reshape(3, length)
    assert not (orders[0] == orders[1]).all()
    assert not (whole.control_row_BS[:length] == whole.control_row_BS[length : 2 * length]).all()
    other = make_plan(seed=8).block(numbers[:length])
    assert not (other.condition_B == orders[0]).all()


def test_an_index_behind_the_epoch_is_refused():
    plan = make_plan()
    with pytest.raises(IndexError, match="per epoch"):
        plan.plan(0, plan.num_sets_per_epoch)


# --- controls -----------------------------------------------------------------------------------


@pytest.mark.parametrize("match_batch", [MatchBatch.prefer, MatchBatch.ignore])
def test_controls_are_of_the_cell_type_and_batch_and_never_drawn_twice(match_batch):
    conditions = grid()
    plan = make_plan(conditions, replace(CONFIG, match_batch=match_batch))
    by_batch = conditions[conditions["is_control"]].groupby(["cell_type", "batch"])["num_cells"]
    large = by_batch.sum() >= 32
    for spec in epoch_of(plan):
        control = pairs(spec.control_condition, spec.control_row)
        summary = pairs(spec.summary_condition, spec.summary_row)
        assert (len(control), len(summary)) == (64, 32)
        assert not control & summary
        own = conditions.loc[spec.condition]
        for condition, row in control | summary:
            drawn = conditions.loc[condition]
            assert drawn["is_control"]
            assert 0 <= row < drawn["num_cells"]
            assert drawn["cell_type"] == own["cell_type"]
            if match_batch is MatchBatch.prefer and large[own["cell_type"], own["batch"]]:
                assert drawn["batch"] == own["batch"]
    announced = {text.split(":")[0] for text in plan.pools.fell_back}
    small = {f"({c}, {b})" for (c, b), is_large in large.items() if not is_large}
    assert announced == (small if match_batch is MatchBatch.prefer else set())


def test_control_draws_cover_the_pool_evenly():
    conditions = pd.DataFrame(
        {"cell_type": "a", "batch": "p", "is_control": [True, False], "num_cells": [500, 6400]}
    )
    plan = make_plan(conditions)
    block = plan.block(np.arange(20 * plan.num_sets_per_epoch))
    for rows in (block.control_row_BS, block.summary_row_BU):
        uses = np.bincount(rows.ravel(), minlength=500)
        assert np.abs(uses - uses.mean()).max() < 5 * np.sqrt(uses.mean())


def test_control_sets_have_three_disjoint_draws_and_their_share():
    conditions = grid(control_cells=(400, 60))
    plan = make_plan(conditions, replace(CONFIG, control_fraction=0.2))
    specs = epoch_of(plan)
    own = [spec for spec in specs if spec.is_control]
    num_treated = len(specs) - len(own)
    assert len(own) == int(0.2 / 0.8 * num_treated + 0.5)
    for spec in own:
        target = {(spec.condition, row) for row in spec.treated_row.tolist()}
        control = pairs(spec.control_condition, spec.control_row)
        summary = pairs(spec.summary_condition, spec.summary_row)
        assert conditions["is_control"][spec.condition]
        assert len(target) == len(spec.treated_row)
        assert not target & control
        assert not target & summary
        assert not control & summary
        if conditions["num_cells"][spec.condition] == 60:
            assert [len(target), len(control), len(summary)] == [20, 20, 20]
        else:
            assert [len(target), len(control), len(summary)] == [64, 64, 32]


def test_a_small_pool_is_divided_evenly():
    conditions = pd.DataFrame(
        {"cell_type": "a", "batch": "p", "is_control": [True, False], "num_cells": [50, 90]}
    )
    for summary, expected in ((64, (25, 25)), (16, (34, 16)), (30, (25, 25))):
        spec = make_plan(conditions, num_summary_cells=summary).plan(0, 0)
        assert (len(spec.control_row), len(spec.summary_row)) == expected


def test_repeats_fill_short_sets_with_their_own_cells():
    conditions = pd.DataFrame(
        {"cell_type": "a", "batch": "p", "is_control": [True, False], "num_cells": [50, 20]}
    )
    plain = make_plan(conditions, num_summary_cells=64)
    filled = make_plan(conditions, replace(CONFIG, short=ShortSets.repeat), num_summary_cells=64)
    one, other = plain.plan(0, 0), filled.plan(0, 0)
    for name, count in (("treated_row", 20), ("control_row", 25), ("summary_row", 25)):
        rows, full = getattr(one, name), getattr(other, name)
        assert (len(rows), len(full)) == (count, 64)
        assert full[:count].tolist() == rows.tolist()
        assert set(full.tolist()) == set(rows.tolist())


# --- evaluation ---------------------------------------------------------------------------------


def test_evaluation_takes_every_cell_once_in_order():
    conditions = grid()
    config = replace(CONFIG, weighting=Weighting.conditions, control_fraction=0.3)
    plan = make_plan(conditions, config, shuffle=False)
    specs = epoch_of(plan)
    treated = conditions[~conditions["is_control"]]["num_cells"]
    rows = {c: [] for c in treated.index}
    for spec in specs:
        rows[spec.condition] += spec.treated_row.tolist()
    assert [spec.condition for spec in specs] == sorted(spec.condition for spec in specs)
    assert rows == {c: list(range(n)) for c, n in treated.items()}
    first = epoch_of(make_plan(conditions, config, shuffle=False, max_sets_per_condition=1))
    assert [spec.condition for spec in first] == list(treated.index)


# --- what cannot be planned ---------------------------------------------------------------------


def test_a_context_without_controls_is_refused():
    conditions = grid()
    conditions.loc[conditions["cell_type"] == "line1", "is_control"] = False
    with pytest.raises(PlanError, match=r"too few control cells.*line1 \(0\).*heldout_controls"):
        make_plan(conditions)


def test_required_batches_are_listed_where_they_are_too_small():
    config = replace(CONFIG, match_batch=MatchBatch.require)
    with pytest.raises(PlanError, match=r"\(line0, plate1\): 20.*match_batch=prefer"):
        make_plan(grid(), config)
    make_plan(grid(), replace(config, minimum_control_cells=20))


def test_nothing_to_plan_is_refused():
    conditions = grid()
    conditions["is_control"] = True
    with pytest.raises(PlanError, match="no condition"):
        make_plan(conditions)


def test_the_hash_knows_every_setting_of_the_plan():
    changed = [
        make_plan(),
        make_plan(seed=8),
        make_plan(set_size=32),
        make_plan(num_summary_cells=16),
        make_plan(identity={"store_fingerprint": "other"}),
        make_plan(config=replace(CONFIG, weighting=Weighting.sqrt)),
        make_plan(config=replace(CONFIG, control_fraction=0.1)),
        make_plan(config=replace(CONFIG, match_batch=MatchBatch.ignore)),
        make_plan(config=replace(CONFIG, minimum_control_cells=20)),
        make_plan(config=replace(CONFIG, short=ShortSets.repeat)),
    ]
    assert len({plan.plan_hash for plan in changed}) == len(changed)
    assert make_plan().plan_hash == make_plan().plan_hash
    loading = replace(CONFIG, reader_threads=7, prefetch_batches=9, target_sum=1.0)
    assert make_plan(config=loading).plan_hash == make_plan().plan_hash


# --- size ---------------------------------------------------------------------------------------


def test_memory_grows_with_conditions_not_with_cells():
    # a quarter of the Tahoe grid in conditions, 26 million cells
    generator = np.random.default_rng(0)
    num_conditions = 16_500
    conditions = pd.DataFrame(
        {
            "cell_type": [f"line{i % 50}" for i in range(num_conditions)],
            "batch": [f"plate{i // 50 % 14}" for i in range(num_conditions)],
            "is_control": np.arange(num_conditions) < 700,
            "num_cells": np.maximum(20, generator.lognormal(7.2, 0.8, num_conditions)).astype(int),
        }
    )
    tracemalloc.start()
    plan = make_plan(conditions, set_size=256, num_summary_cells=256)
    held, peak = tracemalloc.get_traced_memory()
    plan.block(np.arange(16))
    tracemalloc.stop()
    assert plan.num_sets_per_epoch > 90_000
    assert held < 3e6
    assert peak < 20e6


def test_sets_per_epoch_of_the_tahoe_grid():
    grid_file = Path(__file__).parents[3] / "shared/data/tahoe100m_metadata/obs_cell_grid.parquet"
    if not grid_file.exists():
        pytest.skip(f"{grid_file} is not here")
    cells = pd.read_parquet(grid_file)
    conditions = pd.DataFrame(
        {
            "cell_type": cells["cell_name"],
            "batch": cells["plate"],
            "is_control": cells["drug"] == "DMSO_TF",
            "num_cells": cells["n_cells"],
        }
    )
    for set_size, sets in ((32, 3_073_486), (256, 388_929), (512, 198_899)):
        plan = make_plan(conditions, set_size=set_size, num_summary_cells=set_size)
        assert plan.num_sets_per_epoch == sets
