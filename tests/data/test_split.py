"""Splits: the community's rules, and an error for each of their silent cases."""

import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scale.config import HeldoutControls, Unknown
from scale.data.simulate import SimulationConfig, simulate
from scale.data.split import Split, write_few_shot
from scale.data.store import CellSetStore
from scale.types import Perturbation, SplitError

SHARED = Path(__file__).parents[3] / "shared" / "data" / "splits"
LINES, PLATES = ("A549", "K562", "HepG2"), ("p1", "p2")
LABELS = ("DMSO", "drugA", "drugB", "drugC", "drugD")


def make_conditions(labels=LABELS, *, lines=LINES, batches=(None,)):
    """Every label in every line and batch; the first label is the control."""
    rows = [
        {"cell_type": line, "perturbation": number, "batch": batch, "is_control": number == 0}
        for line in lines
        for batch in batches
        for number in range(len(labels))
    ]
    return pd.DataFrame(rows), [Perturbation.parse(label) for label in labels]


@pytest.fixture
def toy_store(toy_store_path):
    with CellSetStore.open(toy_store_path) as store:
        yield store


def write(tmp_path, *, zeroshot=None, fewshot=None, extra="", training=True):
    lines = ['[datasets]\nscreen = "somewhere"', "[training]"]
    lines += ['screen = "train"'] if training else []
    lines += ["[zeroshot]", *(f'"screen.{k}" = "{v}"' for k, v in (zeroshot or {}).items())]
    for context, parts in (fewshot or {}).items():
        lines.append(f'[fewshot."screen.{context}"]')
        lines += [f"{part} = {json.dumps(labels)}" for part, labels in parts.items()]
    path = tmp_path / "split.toml"
    path.write_text("\n".join([*lines, extra]) + "\n")
    return path


def assign(path, conditions=None, perturbations=None, **settings):
    if conditions is None:
        conditions, perturbations = make_conditions()
    part = Split.read(path).assign(conditions, perturbations, **settings)
    names = [perturbations[n].label for n in conditions["perturbation"]]
    return dict(zip(zip(conditions["cell_type"], names, strict=True), part.tolist(), strict=True))


# --- the rules ----------------------------------------------------------------------------------


def test_without_a_file_everything_is_training_data():
    part = Split.everything().assign(*make_conditions())
    assert set(part) == {"train"}


def test_a_zeroshot_context_is_held_out_whole_but_for_its_controls(tmp_path):
    part = assign(write(tmp_path, zeroshot={"K562": "test", "HepG2": "val"}))
    for (line, label), value in part.items():
        held_out = {"K562": "test", "HepG2": "val"}.get(line, "train")
        assert value == ("train" if label == "DMSO" else held_out)


def test_controls_of_zeroshot_contexts_can_be_kept_from_training(tmp_path):
    path = write(tmp_path, zeroshot={"K562": "test"}, fewshot={"HepG2": {"test": ["drugA"]}})
    part = assign(path, heldout_controls=HeldoutControls.excluded)
    assert part["K562", "DMSO"] == "unused"
    assert part["HepG2", "DMSO"] == part["A549", "DMSO"] == "train"
    assert part["K562", "drugA"] == "test"


def test_a_fewshot_context_holds_out_what_is_listed(tmp_path):
    path = write(tmp_path, fewshot={"K562": {"val": ["drugA"], "test": ["drugB", "drugC "]}})
    part = assign(path)
    expected = {"drugA": "val", "drugB": "test", "drugC": "test"}
    for (line, label), value in part.items():
        assert value == (expected.get(label, "train") if line == "K562" else "train")


def test_without_training_table_only_named_contexts_are_used(tmp_path):
    path = write(tmp_path, training=False, fewshot={"K562": {"test": ["drugA"]}})
    part = assign(path)
    for (line, label), value in part.items():
        if line == "K562":
            assert value == ("test" if label == "drugA" else "train")
        else:
            assert value == "unused"


def test_the_context_can_be_the_batch(tmp_path):
    path = write(tmp_path, zeroshot={"p2": "test"}, extra='[scale]\ncontext = "batch"')
    conditions, perturbations = make_conditions(batches=PLATES)
    part = Split.read(path).assign(conditions, perturbations)
    held_out = (conditions["batch"] == "p2") & ~conditions["is_control"]
    np.testing.assert_array_equal(part == "test", held_out)
    with pytest.raises(SplitError, match="15 conditions of the store have no batch; prepare it"):
        Split.read(path).assign(*make_conditions())


def test_a_dot_in_a_context_belongs_to_the_context(tmp_path):
    conditions, perturbations = make_conditions(lines=("K562.v2", "A549"))
    part = assign(write(tmp_path, zeroshot={"K562.v2": "test"}), conditions, perturbations)
    assert part["K562.v2", "drugA"] == "test"


# --- labels -------------------------------------------------------------------------------------

DOSED = (
    "[('DMSO', 0.0, 'uM')]",
    "[('Erdafitinib ', 0.50, 'uM')]",
    "[('Erdafitinib ', 5.0, 'uM')]",
    "[('A', 1.0, 'uM'), ('B', 2.0, 'uM')]",
    "[('Trametinib (DMSO solvate)', 5.0, 'uM')]",
)


def test_blanks_spelling_of_doses_and_order_cannot_miss(tmp_path):
    listed = ["[('Erdafitinib', 0.5, 'uM')]", "[('B', 2, 'uM'), ('A', 1.00, 'uM')]"]
    conditions, perturbations = make_conditions(DOSED)
    path = write(tmp_path, fewshot={"K562": {"test": listed}})
    part = assign(path, conditions, perturbations, labels=DOSED)
    held_out = {label for (line, label), value in part.items() if value == "test"}
    assert held_out == {"[('Erdafitinib', 0.5, 'uM')]", "[('A', 1.0, 'uM'), ('B', 2.0, 'uM')]"}


def test_a_plain_name_is_no_label_where_labels_are_lists(tmp_path):
    conditions, perturbations = make_conditions(DOSED)
    path = write(tmp_path, fewshot={"K562": {"test": ["Erdafitinib"]}})
    with pytest.raises(SplitError, match=r"'Erdafitinib' in test of 'K562'"):
        assign(path, conditions, perturbations, labels=DOSED)


@pytest.mark.parametrize("unit", ["uM", None])
def test_with_a_dose_column_a_name_is_all_doses_and_a_list_is_one(tmp_path, unit):
    perturbations = [
        Perturbation.parse("DMSO"),
        *(Perturbation.parse("drugA", dose=d, unit=unit) for d in (0.5, 5.0)),
        *(Perturbation.parse("drugB", dose=d, unit=unit) for d in (0.5, 5.0)),
    ]
    labels = ["DMSO", "drugA", "drugA", "drugB", "drugB"]
    conditions, _ = make_conditions(labels)
    one_dose = [perturbations[4].label, "[('drugB', 5, 'uM')]"]
    for text in one_dose:
        path = write(tmp_path, fewshot={"K562": {"test": ["drugA"], "val": [text]}})
        part = assign(path, conditions, perturbations, labels=labels)
        assert (
            part["K562", perturbations[1].label] == part["K562", perturbations[2].label] == "test"
        )
        assert part["K562", perturbations[3].label] == "train"
        assert part["K562", perturbations[4].label] == "val"
    path = write(tmp_path, fewshot={"K562": {"test": ["drugA"], "val": [perturbations[1].label]}})
    with pytest.raises(SplitError, match="1 perturbations of 'K562' are in val and in test"):
        assign(path, conditions, perturbations, labels=labels)


def test_combinations_match_in_either_order_and_in_the_source_spelling(tmp_path):
    perturbations = [
        Perturbation.parse("ctrl"),
        Perturbation.parse("KLF1+CEBPE", separator="+"),
        Perturbation.parse("TP53_MYC", separator="_"),
    ]
    labels = ["ctrl", "KLF1+CEBPE", "TP53_MYC"]
    conditions, _ = make_conditions(labels)
    path = write(tmp_path, fewshot={"K562": {"test": ["CEBPE+KLF1"], "val": ["TP53_MYC"]}})
    part = assign(path, conditions, perturbations, labels=labels)
    assert part["K562", "CEBPE+KLF1"] == "test"
    assert part["K562", "MYC+TP53"] == "val"


# --- names that are not in the data -------------------------------------------------------------


def test_unknown_names_are_an_error_with_near_ones(tmp_path):
    path = write(
        tmp_path, zeroshot={"k562": "test"}, fewshot={"A549": {"test": ["drugX", "drugA"]}}
    )
    message = r"2 names are not in the data: cell_type 'k562' \(did you mean 'K562'\?\), 'drugX' in"
    with pytest.raises(SplitError, match=message):
        assign(path)


def test_unknown_names_can_be_a_warning(tmp_path, caplog):
    logger = logging.getLogger("scale")
    logger.addHandler(caplog.handler)
    path = write(tmp_path, fewshot={"A549": {"test": ["drugX", "drugA"]}})
    part = assign(path, unknown=Unknown.warn)
    logger.removeHandler(caplog.handler)
    assert part["A549", "drugA"] == "test"
    assert "1 names are not in the data: 'drugX'" in caplog.text


def test_a_label_that_the_context_lacks_is_known(tmp_path):
    conditions, perturbations = make_conditions()
    lacks = (conditions["cell_type"] == "K562") & (conditions["perturbation"] == 1)
    path = write(tmp_path, fewshot={"K562": {"test": ["drugA", "drugB"]}})
    part = assign(path, conditions[~lacks], perturbations)
    assert [key for key, value in part.items() if value == "test"] == [("K562", "drugB")]


def test_a_part_that_comes_out_empty_is_an_error(tmp_path):
    conditions, perturbations = make_conditions()
    lacks = (conditions["cell_type"] == "K562") & (conditions["perturbation"] == 1)
    path = write(tmp_path, fewshot={"K562": {"test": ["drugA"], "val": ["drugB"]}})
    with pytest.raises(SplitError, match="no condition of the store is in the test part"):
        assign(path, conditions[~lacks], perturbations)
    assert "test" not in assign(path, conditions[~lacks], perturbations, unknown=Unknown.warn)


def test_the_control_cannot_be_held_out(tmp_path):
    path = write(tmp_path, fewshot={"K562": {"test": ["drugA", "DMSO"]}})
    with pytest.raises(SplitError, match="the control 'DMSO' is in the test list of 'K562'"):
        assign(path)


# --- files that contradict themselves -----------------------------------------------------------

LISTS = {"K562": {"test": ["drugA"]}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"zeroshot": {"K562": "test"}, "fewshot": LISTS},
            r"K562 in \[zeroshot\] and in \[fewshot\]",
        ),
        (
            {"fewshot": {"K562": {"val": ["drugA", "drugB"], "test": ["drugA "]}}},
            r"1 labels of \[fewshot.\"screen.K562\"\] are in val and in test \(drugA\)",
        ),
        (
            {
                "fewshot": {
                    "K562": {
                        "val": ["[('A', 0.5, 'uM')]"],
                        "test": ["[('A ', 0.50, 'uM')]"],
                    }
                }
            },
            "are in val and in test",
        ),
        ({"zeroshot": {"K562": "tset"}}, r"\"screen.K562\" = 'tset'; expected \"val\" or \"test\""),
        ({"fewshot": {"K562": {"test": []}}}, "holds nothing out"),
        ({"fewshot": {"K562": {"test": [" "]}}}, "holds an empty label"),
        ({"fewshot": {"K562": {"test": [3]}}}, "is no list of labels"),
        ({"fewshot": {"K562": {"tests": ["drugA"]}}}, "unknown list 'tests'"),
        ({"extra": "[zeroshots]"}, r"unknown table \[zeroshots\]; did you mean 'zeroshot'"),
        ({"extra": "[scale]\ncontext = 'donor'"}, 'context = "donor"; expected'),
        ({"extra": "[scale]\ncontxt = 'batch'"}, r"unknown key 'contxt' in \[scale\]"),
        ({"extra": "seed = "}, "cannot be read"),
        ({"extra": '[fewshot."other.K562"]\ntest = ["a"]'}, r"'other' is not in \[datasets\]"),
        ({"extra": '[fewshot."K562"]\ntest = ["a"]'}, r"\[fewshot\] \"K562\" is no context"),
    ],
)
def test_files_that_mean_nothing_are_refused(tmp_path, arguments, message):
    with pytest.raises(SplitError, match=message):
        Split.read(write(tmp_path, **arguments))


def test_other_files_that_are_refused(tmp_path):
    path = tmp_path / "split.toml"
    with pytest.raises(SplitError, match="cannot be read"):
        Split.read(path)
    path.write_text('[datasets]\n"a.b" = "x"\n')
    with pytest.raises(SplitError, match="dataset 'a.b' has a dot"):
        Split.read(path)
    path.write_text('[datasets]\na = "x"\nb = "y"\n[training]\na = "train"\nb = "train"\n')
    with pytest.raises(SplitError, match=r"about 2 datasets \(a, b\), but a store is one"):
        Split.read(path)
    path.write_text('[datasets]\na = "x"\n[training]\na = "test"\n')
    with pytest.raises(SplitError, match=r"\[training\] a = 'test'; expected \"train\""):
        Split.read(path)
    path.write_text('[datasets]\na = "x"\n[zeroshot]\n"a.K562" = "test"\n"a. K562" = "val"\n')
    with pytest.raises(SplitError, match="context 'K562' is named twice"):
        Split.read(path)


# --- hash and writing ---------------------------------------------------------------------------


def test_the_hash_is_of_what_is_said(tmp_path):
    first = write(tmp_path, fewshot={"K562": {"val": ["drugC"], "test": ["drugA", "drugB"]}})
    one = Split.read(first).sha256
    reordered = write(
        tmp_path,
        fewshot={"K562": {"test": ["drugB ", "drugA", "drugA"], "val": ["drugC"]}},
        extra="[source] # a comment",
    )
    assert Split.read(reordered).sha256 == one
    other = write(tmp_path, fewshot={"K562": {"val": ["drugC"], "test": ["drugA"]}})
    assert Split.read(other).sha256 != one
    assert Split.everything().sha256 != one


def test_a_written_split_holds_out_all_doses_of_an_agent_together(toy_store, tmp_path):
    contexts = ["K562", "HepG2"]
    fractions = {"train_fraction": 0.2, "val_fraction": 0.2}
    split = write_few_shot(tmp_path / "a.toml", toy_store, contexts, **fractions)
    part = split.assign(toy_store.conditions, toy_store.perturbations, labels=toy_store.labels)
    conditions = toy_store.conditions
    assert set(part[~conditions["cell_type"].isin(contexts)]) == {"train"}
    assert set(part[conditions["is_control"]]) == {"train"}
    agents = {}
    for row, value in zip(conditions.itertuples(), part, strict=True):
        names = tuple(c.name for c in toy_store.perturbations[row.perturbation].components)
        agents.setdefault((row.cell_type, names), set()).add(str(value))
    assert all(len(values) == 1 for values in agents.values())
    for context in contexts:
        values = [next(iter(v)) for (c, names), v in agents.items() if c == context]
        assert values.count("val") == 1
        assert values.count("train") == 2  # one agent, and the control
        assert values.count("test") == 3
    again = write_few_shot(tmp_path / "b.toml", toy_store, contexts, **fractions)
    other = write_few_shot(tmp_path / "c.toml", toy_store, contexts, **fractions, seed=1)
    assert again.sha256 == split.sha256 != other.sha256


def test_a_split_that_cannot_be_written(toy_store, tmp_path):
    with pytest.raises(SplitError, match="no cell type 'k562' .*did you mean 'K562'"):
        write_few_shot(tmp_path / "a.toml", toy_store, ["k562"])
    with pytest.raises(SplitError, match="leave none for test"):
        write_few_shot(tmp_path / "a.toml", toy_store, ["K562"], train_fraction=1.0)
    assert not list(tmp_path.iterdir())


def test_the_split_of_a_simulated_screen_fits_it(tmp_path):
    atlas = simulate(SimulationConfig(num_cells=600, num_lines=2, num_drugs=5, num_genes=100))
    atlas.write_split(tmp_path / "split.toml", num_contexts=1)
    conditions, perturbations = make_conditions(["DMSO_TF", *atlas.drugs], lines=atlas.lines)
    part = Split.read(tmp_path / "split.toml").assign(conditions, perturbations)
    assert {"train", "val", "test"} == set(part)
    assert set(conditions["cell_type"][part == "test"]) == {atlas.lines[-1]}


# --- the community's files ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "context", "num_contexts", "num_val", "num_test"),
    [
        ("tahoe100m_fewshot", "cell_type", 5, 54, 735),
        ("tahoe100m_zeroshot", "cell_type", 5, 0, 0),
        ("replogle_nadig_fewshot", "cell_type", 1, 104, 624),
        ("parse_pbmc_fewshot", "batch", 4, 4, 62),
        ("parse_pbmc_zeroshot", "batch", 4, 0, 0),
    ],
)
def test_published_files_are_read(name, context, num_contexts, num_val, num_test):
    path = SHARED / f"{name}.toml"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    split = Split.read(path)
    assert split.context == context
    assert len(split.zeroshot) + len(split.fewshot) == num_contexts
    assert {(len(f.val), len(f.test)) for f in split.fewshot.values()} <= {(num_val, num_test)}


def test_the_published_tahoe_split_on_the_real_grid():
    path = SHARED / "tahoe100m_fewshot.toml"
    grid_path = SHARED.parent / "tahoe100m_metadata" / "obs_cell_grid.parquet"
    if not path.exists() or not grid_path.exists():
        pytest.skip(f"{grid_path} is not there")
    facts = json.loads((SHARED / "facts.json").read_text())["tahoe100m"]
    grid = pd.read_parquet(grid_path)
    lines = pd.read_parquet(grid_path.with_name("cell_line_metadata.parquet"))
    names = dict(zip(lines["cell_name"], lines["Cell_ID_Cellosaur"], strict=True))
    labels = [
        repr([(drug, float(dose), "uM")])
        for drug, dose in zip(grid["drug"], grid["conc"], strict=True)
    ]
    codes, unique = pd.factorize(np.array(labels, dtype=object))
    conditions = pd.DataFrame(
        {
            "cell_type": grid["cell_name"].map(names),
            "perturbation": codes,
            "batch": None,
            "is_control": grid["drug"].str.strip() == "DMSO_TF",
        }
    )
    perturbations = [Perturbation.parse(label) for label in unique]
    part = Split.read(path).assign(conditions, perturbations, labels=list(unique))
    cells = grid["n_cells"].to_numpy()
    assert cells[part == "test"].sum() == facts["counted"]["test_cells"]
    assert cells[part == "val"].sum() == facts["counted"]["val_cells"]
    treated = ~conditions["is_control"].to_numpy()
    assert cells[(part == "train") & treated].sum() == 89_495_239
