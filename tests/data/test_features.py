"""Features of perturbations: their file, what makes it, and what a vocabulary knows by it."""

import dataclasses
import json

import numpy as np
import pytest

from scale.config import compose
from scale.data.feature_source import make_features
from scale.data.features import FeatureTable, check_features, describe_names, feature_rows
from scale.tasks import features as task
from scale.types import PlanError, SourceError, Vocabulary

BLOCKS = ({"kind": "morgan", "size": 3, "radius": 2}, {"kind": "labels", "size": 2})
VECTORS = np.array([[1, 1, 0, 0, 1], [0, 5, 0, 0, 0], [0, 0, 0, 2, 0]], np.float32)
NAMES = ("Imatinib", "Dasatinib", "Talc")
SMILES = {
    "Imatinib": "Cc1ccc(cc1Nc1nccc(n1)c1cccnc1)NC(=O)c1ccc(cc1)CN1CCN(C)CC1",
    "Aspirin": "CC(=O)Oc1ccccc1C(=O)O",
}


def table(names=NAMES, vectors=VECTORS, blocks=BLOCKS):
    return FeatureTable(tuple(names), vectors, blocks, "drugs.npz")


def vocabulary(*names, **changes) -> Vocabulary:
    values = {
        "genes": ("G1",),
        "components": ("<unknown>", "DMSO", *names),
        "cell_types": (),
        "batches": (),
        "perturbations": names,
        "control": "DMSO",
        "perturbation_key": "drug",
        "cell_type_key": "line",
        "batch_key": None,
        "dose_key": None,
        "separator": "+",
        "target_sum": 1e4,
        "value_scale": 1.0,
    }
    return Vocabulary(**values | changes)


def make(folder, *settings):
    return make_features(compose("features", settings, run_dir=folder))


# --- the file -----------------------------------------------------------------------------------


def test_file_gives_back_what_was_written(tmp_path):
    table().write(tmp_path / "f.npz")
    read = FeatureTable.read(tmp_path / "f.npz")
    assert (read.names, read.blocks, read.sha256) == (NAMES, BLOCKS, table().sha256)
    np.testing.assert_array_equal(read.vector_NV, VECTORS)


def test_hash_knows_names_numbers_and_blocks():
    others = [
        table(names=("imatinib", *NAMES[1:])),
        table(vectors=VECTORS * 2),
        table(blocks=({"kind": "morgan", "size": 3, "radius": 3}, BLOCKS[1])),
    ]
    assert len({t.sha256 for t in (table(), *others)}) == 4


def test_damage_is_named_with_its_file(tmp_path):
    path = tmp_path / "f.npz"
    with pytest.raises(FileNotFoundError, match=r"f\.npz"):
        FeatureTable.read(path)
    path.write_bytes(b"no archive")
    with pytest.raises(SourceError, match=r"f\.npz is damaged or no \.npz"):
        FeatureTable.read(path)
    np.savez(path, names=np.array(NAMES), vectors=VECTORS)
    with pytest.raises(SourceError, match=r"f\.npz lacks the arrays blocks, sha256"):
        FeatureTable.read(path)
    blocks = np.array(json.dumps(BLOCKS))
    np.savez(path, names=NAMES, vectors=VECTORS, blocks=blocks, sha256=np.array("0" * 64))
    with pytest.raises(SourceError, match=r"f\.npz is damaged: its content has sha256"):
        FeatureTable.read(path)
    np.savez(path, names=NAMES, vectors=VECTORS, blocks=np.array("{"), sha256=np.array("0"))
    with pytest.raises(SourceError, match=r"f\.npz is damaged: its blocks"):
        FeatureTable.read(path)
    np.savez(path, names=np.array(NAMES, object), vectors=VECTORS, blocks=blocks, sha256=blocks)
    with pytest.raises(SourceError, match=r"without pickle"):
        FeatureTable.read(path)


@pytest.mark.parametrize(
    ("changes", "defect"),
    [
        ({"names": ("Talc", "Talc", "x")}, "'Talc' is there more than once"),
        ({"vectors": VECTORS + np.inf}, "'Imatinib' holds NaN or infinite"),
        ({"vectors": VECTORS * [[1], [0], [1]]}, "'Dasatinib' is zero; leave the name out"),
        ({"vectors": VECTORS[:, :4]}, r"shape \(3, 4\), expected \(3, 5\)"),
    ],
)
def test_tables_that_say_nothing_are_refused(changes, defect):
    with pytest.raises(SourceError, match=f"drugs.npz: .*{defect}"):
        table(**changes)


def test_a_model_reads_blocks_of_equal_length_and_zeros_without_a_vector():
    rows = table().rows(["Imatinib", "nobody", "Dasatinib"])
    size = np.sqrt(5 / 2)
    np.testing.assert_allclose(rows[0, :3], np.array([1, 1, 0]) * size / np.sqrt(2), rtol=1e-6)
    np.testing.assert_allclose(rows[0, 3:], [0, size], rtol=1e-6)
    assert not rows[1].any()
    np.testing.assert_array_equal(rows[2], table(vectors=VECTORS * 7).rows(["Dasatinib"])[0])


# --- what a vocabulary knows ----------------------------------------------------------------------


def test_vocabulary_knows_the_names_that_were_asked_for_and_have_features(tmp_path):
    known = describe_names(vocabulary("Imatinib", "Other"), table(), ["Talc", "nobody", "DMSO"])
    assert known.described == ("Talc",)
    assert (known.num_features, known.feature_sha256) == (5, table().sha256)
    assert [known.row_of[name] for name in ("DMSO", "Imatinib", "Talc")] == [1, 2, 4]
    rows = feature_rows(table(), known)
    np.testing.assert_array_equal(rows.any(1), [False, False, True, False, True])
    np.testing.assert_array_equal(rows[[2, 4]], table().rows(["Imatinib", "Talc"]))
    known.save(tmp_path / "vocabulary.json")
    assert Vocabulary.read(tmp_path / "vocabulary.json") == known


def test_control_never_has_features():
    known = describe_names(vocabulary("Imatinib"), table(names=("Imatinib", "DMSO", "Talc")), [])
    assert not feature_rows(table(names=("Imatinib", "DMSO", "Talc")), known)[:2].any()
    assert "DMSO" not in known.described


def test_features_of_nobody_and_of_another_kind_are_refused(tmp_path):
    with pytest.raises(PlanError, match=r"none of the 1 perturbations.*did you mean 'Imatinib'"):
        describe_names(vocabulary("imatinib "), table(), [])
    known = describe_names(vocabulary("Imatinib"), table(), [])
    other = dataclasses.replace(table(), blocks=({"kind": "vector", "size": 5},))
    with pytest.raises(PlanError, match=r"like=FILE"):
        describe_names(known, other, [])
    table().write(tmp_path / "f.npz")
    check_features(str(tmp_path / "f.npz"), known)
    table(vectors=VECTORS * 2).write(tmp_path / "f.npz")
    with pytest.raises(PlanError, match="has changed since the run began"):
        check_features(str(tmp_path / "f.npz"), known)


def test_a_vocabulary_from_before_features_is_read(tmp_path):
    path = tmp_path / "vocabulary.json"
    vocabulary("Imatinib").save(path)
    record = json.loads(path.read_text())
    for name in ("feature_blocks", "feature_sha256", "described"):
        del record[name]
    path.write_text(json.dumps(record))
    assert Vocabulary.read(path) == vocabulary("Imatinib")


# --- where they come from -------------------------------------------------------------------------


def test_fingerprints_are_those_of_rdkit(tmp_path):
    generators = pytest.importorskip("rdkit.Chem.rdFingerprintGenerator", reason="needs RDKit")
    from rdkit import Chem

    lines = [f"{name},{smiles}" for name, smiles in SMILES.items()]
    (tmp_path / "d.csv").write_text("\n".join(["drug,smiles", *lines, "Mixture,"]))
    made = make(tmp_path, f"input={tmp_path / 'd.csv'}", "name_column=drug", "smiles_column=smiles")
    assert made.names == tuple(SMILES)  # what has no structure is left out
    assert made.blocks == ({"kind": "morgan", "size": 1024, "radius": 2},)
    generator = generators.GetMorganGenerator(radius=2, fpSize=1024)
    for row, smiles in zip(made.vector_NV, SMILES.values(), strict=True):
        expected = np.zeros(1024)
        expected[list(generator.GetFingerprint(Chem.MolFromSmiles(smiles)).GetOnBits())] = 1
        np.testing.assert_array_equal(row, expected)
    (tmp_path / "d.csv").write_text("drug,smiles\nBroken,C1CC\n")
    with pytest.raises(SourceError, match="1 SMILES cannot be read: 'C1CC' of 'Broken'"):
        make(tmp_path, f"input={tmp_path / 'd.csv'}", "name_column=drug", "smiles_column=smiles")


def test_without_rdkit_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rdkit", None)
    (tmp_path / "d.csv").write_text("name,smiles\nA,C\n")
    with pytest.raises(SourceError, match=r"pip install 'scale-virtual-cell\[chemistry\]'"):
        make(tmp_path, f"input={tmp_path / 'd.csv'}", "smiles_column=smiles")


def test_labels_become_columns_and_a_second_file_keeps_them(tmp_path, caplog):
    (tmp_path / "d.tsv").write_text("name\tmoa\ttarget\nA\tx\tT1, T2\nB\ty\t\nC\t\tT2\nD\t\t\n")
    labels = ("label_columns=[moa,target]", "label_separator=','")
    made = make(tmp_path, f"input={tmp_path / 'd.tsv'}", *labels)
    assert made.names == ("A", "B", "C")
    assert [block["labels"] for block in made.blocks] == [["x", "y"], ["T1", "T2"]]
    np.testing.assert_array_equal(made.vector_NV, [[1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 1]])
    made.write(tmp_path / "first.npz")
    (tmp_path / "new.tsv").write_text("name\tmoa\ttarget\nN\tz\tT2\n")
    like = f"like={tmp_path / 'first.npz'}"
    new = make(tmp_path, f"input={tmp_path / 'new.tsv'}", *labels, like)
    assert new.blocks == made.blocks
    np.testing.assert_array_equal(new.vector_NV, [[0, 0, 0, 1]])
    assert "column moa has 1 labels that the other file lacks" in caplog.text
    with pytest.raises(SourceError, match=r"gives labels \(2\), like=.* holds labels \(2\) \+ lab"):
        make(tmp_path, f"input={tmp_path / 'new.tsv'}", "label_columns=[moa]", like)


def test_ready_vectors_of_genes_come_as_table_or_arrays(tmp_path):
    (tmp_path / "g.csv").write_text("name,a,b\nTP53,0.5,-1\nMYC,2,3e-1\n")
    made = make(tmp_path, f"input={tmp_path / 'g.csv'}")
    np.testing.assert_allclose(made.vector_NV, [[0.5, -1], [2, 0.3]])
    np.savez(tmp_path / "g.npz", names=np.array(["TP53", "MYC"]), vectors=made.vector_NV)
    settings = [f"input={tmp_path / 'g.npz'}", f"output={tmp_path / 'out.npz'}"]
    config = compose("features", settings, run_dir=tmp_path)
    assert task.run(config) == 0
    assert FeatureTable.read(tmp_path / "out.npz").sha256 == made.sha256
    with pytest.raises(FileExistsError, match="overwrite=true"):
        task.run(config)


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("name,a\nTP53,x\n", (), r"'x' of 'TP53' in column 'a' is no number"),
        ("name,a\nTP53,1\nTP53,2\n", (), "'TP53' is in column 'name' more than once"),
        ("name,a\n,1\n", (), "row 2 has no name"),
        ("names,a\nA,1\n", (), "no column 'name'; did you mean 'names'"),
        ("name\nA\n", (), "no column beside the names"),
        ("name,moa\nA,\n", ("label_columns=[moa]",), "column 'moa' has no label"),
        ("name,moa\nA,x\n", ("label_columns=[moaa]",), "no column 'moaa'; did you mean 'moa'"),
    ],
)
def test_bad_tables_are_named(tmp_path, text, settings, message):
    (tmp_path / "d.csv").write_text(text)
    with pytest.raises(SourceError, match=message):
        make(tmp_path, f"input={tmp_path / 'd.csv'}", *settings)
