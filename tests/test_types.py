"""Names of perturbations, the vocabulary on disk, and the shapes of a batch."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scale.types import (
    Batch,
    CheckpointError,
    Component,
    Perturbation,
    SourceError,
    Vocabulary,
    did_you_mean,
    nearest,
)

NAMES = st.text("abcXYZ019 -_()", min_size=1, max_size=8).map(str.strip).filter(bool)
DOSES = st.floats(1e-3, 1e3)


@given(st.lists(st.tuples(NAMES, DOSES), min_size=1, max_size=4))
def test_drug_dose_label_is_a_fixed_point_and_order_does_not_matter(items):
    components = tuple(Component(name, dose, "uM") for name, dose in items)
    perturbation = Perturbation(components)
    assert Perturbation.parse(perturbation.label) == perturbation
    assert Perturbation(components[::-1]) == perturbation


@given(st.lists(NAMES, min_size=1, max_size=4))
def test_combination_label_is_a_fixed_point(names):
    perturbation = Perturbation.parse("+".join(names), separator="+")
    assert Perturbation.parse(perturbation.label, separator="+") == perturbation


def test_blanks_and_spelling_of_doses_do_not_make_two_perturbations():
    a = Perturbation.parse("[('Erdafitinib ', 0.50, 'uM')]")
    assert a == Perturbation.parse(" [('Erdafitinib', 0.5, 'uM')]")
    assert a == Perturbation.parse("Erdafitinib", dose=0.5, unit="uM")
    assert Perturbation.parse("A+B").components == (Component("A+B"),)
    assert Perturbation.parse("A", dose=float("nan"), unit="uM") == Perturbation.parse("A")


@pytest.mark.parametrize(
    "label", ["", "  ", "[('A', 0.5)]", "[('A', 'x', 'uM')]", "[('A', 0.5, 'uM'", "[(1, 2, 'uM')]"]
)
def test_unreadable_labels_are_named(label):
    with pytest.raises(SourceError, match="perturbation label"):
        Perturbation.parse(label)


def test_half_of_a_combination_is_named():
    with pytest.raises(SourceError, match="empty perturbation label"):
        Perturbation.parse("A+", separator="+")


def vocabulary(**changes) -> Vocabulary:
    values = {
        "genes": ("G1", "G2"),
        "components": ("<unknown>", "DMSO", "Erdafitinib", "Imatinib"),
        "cell_types": ("A",),
        "batches": (),
        "perturbations": ("Erdafitinib", "Imatinib"),
        "control": "DMSO",
        "perturbation_key": "drug",
        "cell_type_key": "line",
        "batch_key": None,
        "dose_key": None,
        "separator": None,
        "target_sum": 1e4,
        "value_scale": 1.0,
    }
    return Vocabulary(**(values | changes))


def test_vocabulary_survives_its_file(tmp_path):
    vocabulary().save(tmp_path / "vocabulary.json")
    assert Vocabulary.read(tmp_path / "vocabulary.json") == vocabulary()


def test_vocabulary_file_that_lacks_a_field_is_named(tmp_path):
    path = tmp_path / "vocabulary.json"
    vocabulary().save(path)
    record = json.loads(path.read_text())
    del record["genes"]
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="lacks genes"):
        Vocabulary.read(path)


def test_unseen_perturbation_is_answered_with_the_nearest_name():
    assert vocabulary().component_rows(Perturbation.parse("Imatinib")) == [3]
    with pytest.raises(ValueError, match="'Imatinb' was not seen.*did you mean 'Imatinib'"):
        vocabulary().component_rows(Perturbation.parse("Imatinb"))


def test_gene_hash_depends_on_order():
    assert vocabulary().genes_sha256 != vocabulary(genes=("G2", "G1")).genes_sha256


def test_nearest_ignores_case_and_known_names_are_listed_when_nothing_is_near():
    assert nearest("dmso", ["DMSO", "Imatinib"]) == ["DMSO"]
    assert did_you_mean("zzz", ["b", "a"]) == "known: a, b"


def batch(**changes) -> Batch:
    values = {
        "control_BSG": torch.zeros(2, 3, 4),
        "control_mask_BS": torch.ones(2, 3, dtype=torch.bool),
        "summary_BUG": torch.zeros(2, 5, 4),
        "summary_mask_BU": torch.ones(2, 5, dtype=torch.bool),
        "treated_BSG": None,
        "treated_mask_BS": None,
        "control_library_BS": torch.ones(2, 3),
        "treated_library_BS": None,
        "component_BJ": torch.zeros(2, 1, dtype=torch.int64),
        "dose_BJ": torch.full((2, 1), np.nan),
        "cell_type_B": torch.zeros(2, dtype=torch.int64),
        "batch_B": torch.zeros(2, dtype=torch.int64),
        "is_control_B": torch.zeros(2, dtype=torch.bool),
        "condition_B": torch.zeros(2, dtype=torch.int64),
        "set_index_B": torch.arange(2),
    }
    return Batch(**(values | changes))


@pytest.mark.parametrize(
    ("field", "shape"),
    [("control_BSG", (2, 3)), ("summary_BUG", (2, 5, 7)), ("dose_BJ", (2, 2)), ("batch_B", (3,))],
)
def test_shapes_that_disagree_are_refused(field, shape):
    with pytest.raises(ValueError, match=rf"Batch\.{field}|other fields"):
        batch(**{field: torch.zeros(shape)})


def test_batch_moves_whole_and_is_frozen():
    moved = batch().to(torch.device("cpu"))
    assert moved.num_sets == 2
    assert moved.treated_BSG is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        moved.control_BSG = torch.zeros(1)
