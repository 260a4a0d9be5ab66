"""Laws of the data module: what a run reads, resumes and refuses."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields, replace
from hashlib import sha256

import numpy as np
import pytest
import torch
from cell_set_store import BATCHES, CELL_TYPES, CONTROL, NUM_GENES, write_store
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scale.config import DataConfig, HeldoutControls, MatchBatch, ShortSets, Weighting
from scale.data.dataset import CellSetDataset
from scale.data.module import (
    CellSetDataModule,
    extend_vocabulary,
    training_conditions,
)
from scale.data.sampler import SetPlan
from scale.data.shards import Shards
from scale.data.store import CellSetStore
from scale.types import ABSENT, UNKNOWN_COMPONENT, PlanError, SplitError

SPLIT = """
[datasets]
toy = "."
[training]
toy = "train"
[zeroshot]
"toy.K562" = "test"
[fewshot."toy.HepG2"]
val = ["crizotinib"]
test = ["bortezomib"]
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("module") / "store")


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    file = tmp_path_factory.mktemp("split") / "split.toml"
    file.write_text(SPLIT)
    return str(file)


@pytest.fixture
def make(path):
    """Return a function that makes modules and closes them at the end."""
    made = []

    def module(*, rank=0, size=1, seed=3, vocabulary=None, set_size=48, store=path, **changes):
        made.append(
            CellSetDataModule(
                DataConfig(store=str(store), **changes),
                set_size=set_size,
                num_summary_cells=24,
                seed=seed,
                vocabulary=vocabulary,
                data_parallel_rank=rank,
                data_parallel_size=size,
            )
        )
        return made[-1]

    yield module
    for one in made:
        one.close()


def steps(module, num, *, consumed_sets=0, sets_per_batch=8, sets_per_micro_batch=None):
    batches = module.train_batches(
        consumed_sets=consumed_sets,
        sets_per_batch=sets_per_batch,
        sets_per_micro_batch=sets_per_micro_batch,
    )
    return list(itertools.islice(batches, num))


def sets_of(batches):
    """Return every set of some batches by its number."""
    found = {}
    for batch in batches:
        for b, number in enumerate(batch.set_index_B.tolist()):
            assert number not in found
            found[number] = {f.name: getattr(batch, f.name)[b] for f in fields(batch)}
    return found


def assert_same_sets(one, other):
    assert sorted(one) == sorted(other)
    for number, left in one.items():
        for name, value in left.items():
            right = other[number][name]
            assert torch.equal(value.nan_to_num(-7.0), right.nan_to_num(-7.0)), (number, name)


# --- order --------------------------------------------------------------------------------------


def test_a_step_has_the_same_sets_at_every_layout(make):
    expected = [sets_of(step) for step in steps(make(), 9)]
    length = make().train_plan.num_sets_per_epoch
    assert 2 * length < 9 * 8  # batches straddle epochs
    for size, micro, threads in ((1, 2, 1), (2, None, 3), (2, 1, 2), (4, 2, 2), (4, 1, 4)):
        ranks = [
            steps(
                make(rank=rank, size=size, reader_threads=threads, prefetch_batches=threads),
                9,
                sets_per_micro_batch=micro,
            )
            for rank in range(size)
        ]
        for t, reference in enumerate(expected):
            assert sorted(reference) == list(range(8 * t, 8 * t + 8))
            shares = [list(rank[t]) for rank in ranks]
            assert_same_sets(reference, sets_of(itertools.chain(*shares)))
            # Megatron's order: micro-step j of rank r starts at set (j D + r) b of the step
            width = micro or 8 // size
            for r, share in enumerate(shares):
                starts = [int(batch.set_index_B[0]) for batch in share]
                assert starts == [8 * t + (j * size + r) * width for j in range(len(share))]


SETS_PER_BATCH = 12
WORLDS = (1, 2, 3, 4, 6, 12)


def digests(batch):
    """Return number and hash of all bytes of each set, in the order of the batch."""
    found = []
    for b, number in enumerate(batch.set_index_B.tolist()):
        digest = sha256()
        for field in fields(batch):
            digest.update(getattr(batch, field.name)[b].contiguous().numpy().tobytes())
        found.append((number, digest.hexdigest()))
    return found


def run_segment(make, state, num_steps, *, world, choice, threads, prefetch, **changes):
    """Go on from ``state`` with ``world`` ranks; return the sets in Megatron's order."""
    share = SETS_PER_BATCH // world
    micro = [d for d in range(1, share + 1) if share % d == 0]
    micro = micro[choice % len(micro)]
    by_rank = []
    for rank in range(world):
        module = make(
            rank=rank, size=world, reader_threads=threads, prefetch_batches=prefetch, **changes
        )
        start = 0 if state is None else module.check_state(state)
        by_rank.append(
            steps(
                module,
                num_steps,
                consumed_sets=start,
                sets_per_batch=SETS_PER_BATCH,
                sets_per_micro_batch=micro,
            )
        )
        new_state = module.state_dict(start + num_steps * SETS_PER_BATCH)
        module.close()
    found = []
    for step in zip(*by_rank, strict=True):
        for micro_batches in zip(*step, strict=True):
            for batch in micro_batches:
                found += digests(batch)
    return found, new_state


segments = st.lists(
    st.fixed_dictionaries(
        {
            "num_steps": st.integers(1, 4),
            "world": st.sampled_from(WORLDS),
            "choice": st.integers(0, 5),
            "threads": st.integers(1, 3),
            "prefetch": st.integers(1, 5),
        }
    ),
    min_size=1,
    max_size=4,
)


def segment(num_steps, world, choice=0, threads=2, prefetch=2):
    return {
        "num_steps": num_steps,
        "world": world,
        "choice": choice,
        "threads": threads,
        "prefetch": prefetch,
    }


@pytest.mark.parametrize(
    "changes", [{}, {"control_fraction": 0.2, "short": ShortSets.repeat}], ids=["mask", "repeat"]
)
def test_any_sequence_of_worlds_and_stops_reads_what_one_process_reads(make, changes):
    expected, _ = run_segment(make, None, **segment(16, 1), **changes)
    assert [number for number, _ in expected] == list(range(16 * SETS_PER_BATCH))
    # all sets of all epochs are different draws
    assert len({digest for _, digest in expected}) == len(expected)

    @settings(max_examples=8, deadline=None)
    @given(parts=segments)
    @example(parts=[segment(3, 1), segment(2, 2, 1), segment(4, 4, 2, 1, 1), segment(3, 3, 1, 3)])
    @example(parts=[segment(1, 12), segment(1, 6, 1), segment(1, 1, 3), segment(1, 4, 1)])
    def law(parts):
        state, found = None, []
        for part in parts:
            more, state = run_segment(make, state, **part, **changes)
            found += more
        assert found == expected[: len(found)]

    law()


def test_resume_at_any_step_equals_the_uninterrupted_run(make):
    whole = [sets_of(step) for step in steps(make(), 8)]
    for done in (1, 3, 7):
        state = make().state_dict(8 * done)
        resumed = make(reader_threads=3, prefetch_batches=1)
        again = steps(resumed, 8 - done, consumed_sets=resumed.check_state(state))
        for one, other in zip(whole[done:], again, strict=True):
            assert_same_sets(one, sets_of(other))


def test_set_order_does_not_depend_on_the_batch_size(make):
    four = sets_of(itertools.chain(*steps(make(), 6, sets_per_batch=4)))
    twelve = sets_of(itertools.chain(*steps(make(), 2, sets_per_batch=12)))
    assert_same_sets(four, twelve)


def test_sizes_that_do_not_divide_are_refused(make):
    with pytest.raises(PlanError, match=r"sets_per_batch \(9\) must be a multiple of the 2"):
        steps(make(size=2), 1, sets_per_batch=9)
    with pytest.raises(PlanError, match=r"sets_per_micro_batch \(3\) must divide the 4"):
        steps(make(size=2), 1, sets_per_micro_batch=3)


# --- what is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("control_fraction", [0.0, 0.3])
@pytest.mark.parametrize("controls", list(HeldoutControls))
def test_training_reads_no_chunk_of_what_is_held_out(make, split, controls, control_fraction):
    module = make(split=split, heldout_controls=controls, control_fraction=control_fraction)
    steps(module, module.train_plan.num_sets_per_epoch, sets_per_batch=4)
    read = set(module.store.chunks["condition"][module.train_reader.was_read].tolist())
    table = module.store.conditions
    treated = set(table.index[~table["is_control"]])
    assert read & treated == set(module.part_conditions("train"))
    contexts = {table["cell_type"][c] for c in read - treated}
    # without training conditions of K562, its controls are drawn only as targets, where shared
    is_target = control_fraction > 0 and controls is HeldoutControls.shared
    assert contexts == {"A549", "HepG2"} | ({"K562"} if is_target else set())


@pytest.mark.parametrize("controls", list(HeldoutControls))
def test_training_touches_no_byte_of_what_is_held_out(make, split, controls, monkeypatch):
    asked = []

    def record(real):
        def recorded(self, shard, begin, end):
            asked.append((shard, begin, end))
            return real(self, shard, begin, end)

        monkeypatch.setattr(Shards, real.__name__, recorded)

    record(Shards.read)
    record(Shards.will_need)
    module = make(split=split, heldout_controls=controls, control_fraction=0.3)
    steps(module, module.train_plan.num_sets_per_epoch, sets_per_batch=4)
    module.control_pool.join()
    index = module.store.chunks
    usable = np.isin(
        index["condition"], module.part_conditions("train") + module._controls("train")
    )
    allowed = {}
    for entry in index[usable]:
        shard, begin, size = int(entry["shard"]), int(entry["offset"]), int(entry["length"])
        # with the padding behind a chunk
        allowed.setdefault(shard, set()).update(range(begin, begin + -(-size // 8) * 8))
    assert asked
    for shard, begin, end in asked:
        assert set(range(begin, end)) <= allowed[shard]


def test_parts_are_those_of_the_split(make, split):
    module = make(split=split)
    assert all(module.has_part(part) for part in ("train", "val", "test"))
    plain = make()
    assert not plain.has_part("val")
    with pytest.raises(PlanError, match="no split has no val conditions"):
        next(plain.part_batches("val", max_sets_per_condition=1, sets_per_batch=1))
    labels = [module.store.condition(c) for c in module.part_conditions("val")]
    assert {(x.cell_type, x.perturbation.label) for x in labels} == {("HepG2", "crizotinib")}


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_a_part_is_given_whole_and_in_order(make, split, part):
    module = make(split=split)
    batches = list(module.part_batches(part, max_sets_per_condition=None, sets_per_batch=3))
    found = sets_of(batches)
    assert list(found) == list(range(len(found)))
    conditions = [int(one["condition_B"]) for one in found.values()]
    assert conditions == sorted(conditions)
    sizes = module.store.conditions["num_cells"]
    for c in module.part_conditions(part):
        own = [one for one in found.values() if one["condition_B"] == c]
        values = torch.cat([one["treated_BSG"][one["treated_mask_BS"]] for one in own])
        cells = module.store.to_anndata([c])
        assert len(values) == sizes[c]
        scale = 10_000 / cells.obs["library"].to_numpy(float)
        expected = np.log1p(cells.X.toarray() * scale[:, None])
        np.testing.assert_allclose(values.numpy(), expected, rtol=2e-6, atol=1e-6)
    limited = sets_of(module.part_batches(part, max_sets_per_condition=1, sets_per_batch=3))
    assert len(limited) == len(module.part_conditions(part))
    again = sets_of(module.part_batches(part, max_sets_per_condition=1, sets_per_batch=2))
    assert_same_sets(limited, again)


@pytest.mark.parametrize("num_ranks", [2, 3, 20])
def test_ranks_read_runs_of_a_part_that_are_all_of_it(make, split, num_ranks):
    limits = {"max_sets_per_condition": None, "sets_per_batch": 2}
    whole = sets_of(make(split=split).part_batches("test", **limits))
    shares = [
        sets_of(make(rank=rank, size=num_ranks, split=split).part_batches("test", **limits))
        for rank in range(num_ranks)
    ]
    assert [number for share in shares for number in share] == list(whole)
    assert_same_sets(whole, {n: one for share in shares for n, one in share.items()})
    sizes = [-(-len(share) // 2) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_held_out_names_are_unknown_to_the_model(make, split):
    module = make(split=split)
    assert module.vocabulary.cell_types == ("A549", "HepG2")
    (batch,) = module.part_batches("test", max_sets_per_condition=1, sets_per_batch=100)
    for b, c in enumerate(batch.condition_B.tolist()):
        is_known = module.store.condition(c).cell_type == "HepG2"
        assert (batch.cell_type_B[b] == ABSENT) == (not is_known)
        assert (batch.component_BJ[b] != UNKNOWN_COMPONENT).all()


# --- vocabulary ---------------------------------------------------------------------------------


def test_the_vocabulary_is_made_of_training_conditions(make, split):
    vocabulary = make().vocabulary
    drugs = ("azacitidine", "bortezomib", "crizotinib", "dasatinib", "erlotinib")
    assert vocabulary.components == ("<unknown>", CONTROL, *drugs)
    labels = ("crizotinib", "crizotinib+erlotinib", "dasatinib")
    assert vocabulary.perturbations == (*drugs[:2], *labels)
    assert (vocabulary.cell_types, vocabulary.batches) == (CELL_TYPES, BATCHES)
    assert vocabulary.perturbation_key == "drug"
    assert (vocabulary.control, vocabulary.separator) == (CONTROL, "+")
    with_controls = make(split=split, control_fraction=0.1).vocabulary
    assert with_controls.cell_types == CELL_TYPES  # their controls are targets too


def test_unknown_training_names_are_refused_and_can_be_appended(make, split, path):
    small = replace(
        make(split=split).vocabulary, components=("<unknown>", CONTROL, "dasatinib", "crizotinib")
    )
    module = make(vocabulary=small)
    with pytest.raises(PlanError, match=r"3 perturbations \(azacitidine, bor.*extend_vocabulary"):
        steps(module, 1)
    with CellSetStore.open(path) as store:
        conditions = training_conditions(store, DataConfig(store=str(path)))
        extended = extend_vocabulary(small, store, conditions)
    assert extended.components[:4] == small.components
    assert extended.components[4:] == ("azacitidine", "bortezomib", "erlotinib")
    assert extended.cell_types == ("A549", "HepG2", "K562")
    assert extended.genes == small.genes
    (batch,) = steps(make(vocabulary=extended), 1)[0]
    assert set(batch.component_BJ.unique().tolist()) <= {-1, 2, 3, 4, 5, 6}


def test_a_store_is_aligned_to_the_genes_of_a_vocabulary(make):
    vocabulary = make().vocabulary
    genes = (*vocabulary.genes[:100:-1], "new")
    module = make(vocabulary=replace(vocabulary, genes=genes))
    plain, aligned = steps(make(), 1)[0][0], steps(module, 1)[0][0]
    assert aligned.treated_BSG.shape[-1] == len(genes)
    assert torch.equal(aligned.treated_BSG[..., :-1], plain.treated_BSG.flip(-1)[..., :-101])
    assert not aligned.treated_BSG[..., -1].any()
    one, other = make().statistics(4), module.statistics(4)
    np.testing.assert_allclose(other.mean_G[:-1], one.mean_G[:100:-1], rtol=1e-6)


def test_another_normalisation_than_the_models_is_refused(make):
    vocabulary = make().vocabulary
    with pytest.raises(PlanError, match=r"data.target_sum is 4000, .* trained with 10000"):
        make(vocabulary=vocabulary, target_sum=4000.0)


# --- statistics ---------------------------------------------------------------------------------


@pytest.mark.parametrize("max_cells", [100_000, 120])
def test_statistics_are_mean_and_principal_components(make, split, max_cells):
    module = make(split=split, heldout_controls=HeldoutControls.excluded)
    found = module.statistics(num_components=8, max_cells=max_cells)
    again = make(split=split, heldout_controls=HeldoutControls.excluded)
    again = again.statistics(num_components=8, max_cells=max_cells)
    assert np.array_equal(found.basis_GP, again.basis_GP)
    assert found.mean_G.dtype == found.basis_GP.dtype == np.float32
    gram = found.basis_GP.T @ found.basis_GP
    np.testing.assert_allclose(gram, np.eye(8), atol=1e-5)
    largest = found.basis_GP[np.abs(found.basis_GP).argmax(axis=0), np.arange(8)]
    assert (largest > 0).all()
    if max_cells > 1000:  # all cells: the sample is the population
        used = module.part_conditions("train") + module._controls("train")
        cells = module.store.to_anndata(used)
        scale = 10_000 / cells.obs["library"].to_numpy(float)
        values = np.log1p(cells.X.toarray() * scale[:, None])
        np.testing.assert_allclose(found.mean_G, values.mean(axis=0), rtol=1e-5, atol=1e-6)
        _, _, rows = np.linalg.svd(values - values.mean(axis=0), full_matrices=False)
        overlap = np.abs(np.sum(rows[:8].T * found.basis_GP, axis=0))
        np.testing.assert_allclose(overlap, 1.0, atol=1e-4)


def test_statistics_have_their_shape_for_few_cells(make):
    found = make().statistics(num_components=30, max_cells=5)
    assert found.basis_GP.shape == (NUM_GENES, 30)
    # five cells span four directions
    assert (np.linalg.norm(found.basis_GP, axis=0) > 0.5).sum() == 4
    assert not found.basis_GP[:, 4:].any()


# --- position and refusals ----------------------------------------------------------------------


def test_a_position_of_another_plan_is_refused_by_the_field(make, split):
    state = make().state_dict(24)
    assert set(state) >= {"plan_version", "seed", "consumed_sets", "plan_hash", "store_fingerprint"}
    for changes, name in (
        ({"weighting": Weighting.sqrt}, "weighting was 'cells' and is 'sqrt'"),
        ({"seed": 4}, "seed was 3 and is 4"),
        ({"set_size": 32}, "set_size was 48 and is 32"),
        ({"split": split}, "split_sha256 was"),
    ):
        with pytest.raises(PlanError, match=name):
            make(**changes).check_state(state)
    assert make(reader_threads=5, prefetch_batches=2).check_state(state) == 24


def test_a_changed_plan_goes_on_at_an_epoch_boundary(make, caplog):
    state = make().state_dict(24)
    module = make(weighting=Weighting.conditions, allow_plan_change=True)
    start = module.check_state(state)
    assert start % module.train_plan.num_sets_per_epoch == 0
    assert 24 <= start < 24 + module.train_plan.num_sets_per_epoch
    assert "plan changed (weighting was" in caplog.text


def test_no_training_conditions_is_an_error_with_counts(make, tmp_path):
    file = tmp_path / "all.toml"
    held = "".join(f'"toy.{name}" = "test"\n' for name in CELL_TYPES)
    file.write_text(f'[datasets]\ntoy = "."\n[training]\ntoy = "train"\n[zeroshot]\n{held}')
    with pytest.raises(PlanError, match=r"no training conditions: of 18 treated .* 18 test"):
        make(split=str(file))


def test_refusals_come_before_the_first_batch(make, tmp_path):
    with pytest.raises(PlanError, match=r"\(K562, p2\): 20"):
        make(match_batch=MatchBatch.require)
    misspelt = tmp_path / "misspelt.toml"
    misspelt.write_text(SPLIT.replace("crizotinib", "crizotinip"))
    with pytest.raises(SplitError, match="crizotinip"):
        make(split=str(misspelt))


def test_describe_says_what_is_used_and_what_fell_back(make, split):
    text = "\n".join(make(split=split).describe())
    for part in ("train: ", "val: ", "test: ", "controls: ", "sets per epoch"):
        assert part in text
    text = "\n".join(make().describe())
    assert "val: 0 conditions, 0 cells (no validation)" in text
    assert "1 control pools have fewer than 32 cells" in text
    assert "(K562, p2): 20" in text


# --- the contract of BioNeMo --------------------------------------------------------------------


@dataclass
class EpochIndex:
    epoch: int
    idx: int


def test_the_dataset_is_a_function_of_epoch_and_index(make):
    module = make()
    dataset = CellSetDataset(module)
    length = len(dataset)
    assert length == module.train_plan.num_sets_per_epoch
    numbers = [(0, 0), (1, length - 1), (5, 2)]
    for epoch, index in numbers:
        one, other = dataset[EpochIndex(epoch, index)], dataset[EpochIndex(epoch, index)]
        assert_same_sets(sets_of([one]), sets_of([other]))
        assert one.set_index_B.tolist() == [epoch * length + index]
    assert_same_sets(
        sets_of(dataset[EpochIndex(0, i)] for i in range(8)), sets_of(steps(make(), 1)[0])
    )
    with pytest.raises(IndexError, match="set 10000 of"):
        dataset[EpochIndex(0, 10_000)]


def test_the_plan_is_that_of_the_sampler(make):
    module = make()
    is_control = module.store.conditions["is_control"].to_numpy()
    plan = SetPlan(
        module.store.conditions,
        np.flatnonzero(~is_control),
        np.flatnonzero(is_control),
        module.config,
        set_size=48,
        num_summary_cells=24,
        seed=3,
    )
    for batch in itertools.chain(*steps(module, 5)):
        assert (
            batch.condition_B.tolist() == plan.block(batch.set_index_B.numpy()).condition_B.tolist()
        )
