"""Splits: the community's rules, and an error for each of their silent cases."""

import json
import logging
import re
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scale.config import HeldoutControls, Unknown, compose, config_dir
from scale.data.simulate import SimulationConfig, simulate
from scale.data.split import Split, write_few_shot
from scale.data.store import CellSetStore
from scale.types import Perturbation, SplitError

SHARED = Path(__file__).parents[3] / "shared" / "data"
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


# --- found by path or by name -------------------------------------------------------------------


def test_a_bare_name_is_a_split_that_ships_and_all_else_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = write(tmp_path, zeroshot={"K562": "test"})
    own.rename("tahoe100m_zeroshot.toml")
    Path("tahoe100m_zeroshot").write_bytes(Path("tahoe100m_zeroshot.toml").read_bytes())
    shipped = Split.read("tahoe100m_zeroshot")
    assert "CVCL_0480" in shipped.zeroshot
    for path in (
        "tahoe100m_zeroshot.toml",
        "./tahoe100m_zeroshot",
        tmp_path / "tahoe100m_zeroshot",
    ):
        assert list(Split.read(path).zeroshot) == ["K562"]


def test_a_split_that_is_nowhere_is_an_error_with_both_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = re.escape(str(config_dir() / "splits"))
    with pytest.raises(
        SplitError,
        match=f"no split 'tahoe_fewshot' ships in {folder}: did you mean 'tahoe100m_fewshot'.*"
        r"give its path, tahoe_fewshot.toml or ./tahoe_fewshot",
    ):
        Split.read("tahoe_fewshot")
    with pytest.raises(
        SplitError, match=f"no such file in {re.escape(str(tmp_path))}; a bare name .* in {folder}"
    ):
        Split.read("tahoe100m.toml")


# --- comparison with the data -------------------------------------------------------------------


def test_a_comparison_names_all_that_is_not_in_the_data(tmp_path):
    conditions, perturbations = make_conditions()
    lacks = (conditions["cell_type"] == "K562") & (conditions["perturbation"] == 1)
    fewshot = {
        "K562": {"val": ["drugA", "drugX"], "test": ["drugB"]},
        "A-549": {"test": ["drugC", "drugY"]},
    }
    split = Split.read(write(tmp_path, fewshot=fewshot))
    found = split.compare(conditions[~lacks], perturbations)
    assert [text.split(" (")[0] for text in found.missing] == [
        "cell_type 'A-549'",
        "'drugX' in val of 'K562'",
        "'drugY' in test of 'A-549'",
    ]
    assert "did you mean 'A549'" in found.missing[0]
    assert found.unmeasured == ["'drugA' in val of 'K562'"]
    part = split.assign(conditions[~lacks], perturbations, unknown=Unknown.warn)
    np.testing.assert_array_equal(found.part_C, part)


def test_a_comparison_with_data_that_fits_names_nothing(toy_store, tmp_path):
    split = write_few_shot(tmp_path / "split.toml", toy_store, ["K562"])
    store = toy_store
    found = split.compare(store.conditions, store.perturbations, labels=store.labels)
    assert found.missing == found.unmeasured == []


# --- the splits that ship -----------------------------------------------------------------------

SHIPPED = [
    ("tahoe100m_fewshot", "cell_type", 5, 54, 735),
    ("tahoe100m_zeroshot", "cell_type", 5, 0, 0),
    ("replogle_nadig_fewshot", "cell_type", 1, 104, 624),
    ("parse_pbmc_fewshot", "batch", 4, 4, 62),
    ("parse_pbmc_zeroshot", "batch", 4, 0, 0),
]


def test_all_splits_that_ship_are_listed_here():
    files = {file.stem for file in (config_dir() / "splits").iterdir()}
    assert files == {name for name, *_ in SHIPPED}


@pytest.mark.parametrize(("name", "context", "num_contexts", "num_val", "num_test"), SHIPPED)
def test_splits_that_ship_are_read(name, context, num_contexts, num_val, num_test):
    split = Split.read(name)
    assert split.context == context
    assert len(split.zeroshot) + len(split.fewshot) == num_contexts
    assert set(split.zeroshot.values()) <= {"test"}
    for lists in split.fewshot.values():
        assert (len(lists.val), len(lists.test)) == (num_val, num_test)
        assert (len(set(lists.val)), len(set(lists.test))) == (num_val, num_test)
        assert lists == next(iter(split.fewshot.values()))
    if name.endswith("fewshot") and num_contexts > 1:
        assert set(split.fewshot) == set(Split.read(name.replace("few", "zero")).zeroshot)


def test_drugs_of_the_tahoe_split_are_disjoint_and_verbatim():
    lists = Split.read("tahoe100m_fewshot").fewshot["CVCL_0480"]
    drugs = [
        {Perturbation.parse(text).components[0].name for text in part}
        for part in (lists.val, lists.test)
    ]
    assert [len(names) for names in drugs] == [19, 268]
    assert not drugs[0] & drugs[1]
    verbatim = [text for text in (*lists.val, *lists.test) if "Erdafitinib" in text]
    assert verbatim
    assert all("'Erdafitinib '" in text for text in verbatim)


@pytest.mark.parametrize("option", ["tahoe", "replogle", "pbmc"])
def test_options_of_data_name_splits_that_ship(option, tmp_path):
    config = compose("pretrain", [f"data={option}"], run_dir=tmp_path)
    assert Split.read(config.data.split).fewshot
    if option != "replogle":
        name = config.data.split.replace("few", "zero")
        config = compose("pretrain", [f"data={option}", f"data.split={name}"], run_dir=tmp_path)
        assert Split.read(config.data.split).zeroshot


def test_cell_load_reads_the_splits_that_ship_alike():
    python = Path(__file__).parents[2] / ".cache" / "cell-load" / "bin" / "python"
    if not python.exists():
        pytest.skip("cell-load is not there; scripts/cell_load_environment makes it")
    code = """
import json, sys
from cell_load.config import ExperimentConfig
read = {}
for path in sys.argv[1:]:
    config = ExperimentConfig.from_toml(path)
    config.validate()
    dataset, = config.get_all_datasets()
    zeroshot = config.get_zeroshot_celltypes(dataset)
    read[path] = [zeroshot, config.get_fewshot_celltypes(dataset), config.training]
print(json.dumps(read))
"""
    files = [str(config_dir() / "splits" / f"{name}.toml") for name, *_ in SHIPPED]
    done = subprocess.run(
        [str(python), "-c", code, *files], capture_output=True, text=True, check=True
    )
    for path, (zeroshot, fewshot, training) in json.loads(done.stdout).items():
        split = Split.read(path)
        assert zeroshot == split.zeroshot
        assert fewshot == {
            context: {"val": list(lists.val), "test": list(lists.test)}
            for context, lists in split.fewshot.items()
        }
        assert (list(training.values()) == ["train"]) == split.is_training


@pytest.fixture(scope="module")
def tahoe_grid():
    """Conditions of the published cells: one for each line, drug and dose, with its cells."""
    path = SHARED / "tahoe100m_metadata" / "obs_cell_grid.parquet"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    grid = pd.read_parquet(path)
    lines = pd.read_parquet(path.with_name("cell_line_metadata.parquet"))
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
            "num_cells": grid["n_cells"],
        }
    )
    return conditions, [Perturbation.parse(label) for label in unique], list(unique)


def test_the_few_shot_split_on_the_published_cells_of_tahoe(tahoe_grid):
    conditions, perturbations, labels = tahoe_grid
    found = Split.read("tahoe100m_fewshot").compare(conditions, perturbations, labels=labels)
    assert found.missing == []
    assert len(found.unmeasured) == 1
    assert found.unmeasured[0].endswith("in test of 'CVCL_0480'")
    treated = ~conditions["is_control"].to_numpy()
    cells = conditions["num_cells"].to_numpy()
    sums = {p: cells[(found.part_C == p) & treated].sum() for p in ("train", "val", "test")}
    assert sums == {"train": 89_495_239, "val": 553_076, "test": 8_270_319}
    test = conditions[found.part_C == "test"]
    assert len(test[["cell_type", "perturbation"]].drop_duplicates()) == 3_674
    val = conditions[found.part_C == "val"]
    blank = {(row.cell_type, labels[row.perturbation]) for row in val.itertuples()}
    assert len([1 for _, label in blank if "('Erdafitinib '," in label]) == 5 * 3


def test_the_zero_shot_split_on_the_published_cells_of_tahoe(tahoe_grid):
    conditions, perturbations, labels = tahoe_grid
    part = Split.read("tahoe100m_zeroshot").assign(conditions, perturbations, labels=labels)
    treated = ~conditions["is_control"].to_numpy()
    cells = conditions["num_cells"].to_numpy()
    assert cells[(part == "test") & treated].sum() == 13_468_118
    assert cells[(part == "train") & treated].sum() == 84_850_516
    assert set(part[~treated]) == {"train"}


def test_a_blank_more_or_less_in_the_data_cannot_miss():
    """Lists say 'Erdafitinib ', as the published cells do; a cleaned source is matched alike."""
    split = Split.read("tahoe100m_fewshot")
    texts = [text for text in split.fewshot["CVCL_1097"].val if "Erdafitinib" in text]
    assert len(texts) == 3
    for labels in (texts, [text.replace("b '", "b'") for text in texts]):
        controlled = ("[('DMSO_TF', 0.0, 'uM')]", *labels)
        conditions, perturbations = make_conditions(controlled, lines=tuple(split.fewshot))
        found = split.compare(conditions, perturbations, labels=controlled)
        np.testing.assert_array_equal(found.part_C == "val", ~conditions["is_control"])
