"""Perturbations that no training saw: known to a run by their features, or to a prediction."""

import anndata as ad
import numpy as np
import pytest

import scale
from scale.config import compose
from scale.data.features import FeatureTable
from scale.predict.predictor import load
from scale.runtime import StopSignal
from scale.tasks import finetune, predict, pretrain
from scale.types import PlanError

BLOCKS = ({"kind": "vector", "size": 6},)
HELD_OUT = "[('drugC', 0.5, 'uM')]"
NEW = "[('new', 0.5, 'uM')]"
SPLIT = '[datasets]\ntoy = "."\n[training]\ntoy = "train"\n' + "".join(
    f'[fewshot."toy.{line}"]\ntest = ["{HELD_OUT}"]\n' for line in ("A549", "HepG2", "K562")
)
TRAINING = (
    *("model.hidden_size=16", "model.num_layers=1", "model.num_heads=2"),
    *("model.ffn_hidden_size=32", "model.set_size=8", "model.num_summary_cells=8"),
    *(
        "trainer.sets_per_batch=4",
        "trainer.max_steps=4",
        "checkpoint.every_steps=4",
        "validation.every_steps=9",
    ),
    *("optimizer.lr=0.02", "optimizer.warmup_steps=1", "optimizer.ema_decay=0"),
)


def train(run_dir, store, *changes):
    settings = [*TRAINING, f"data.store={store}", *changes]
    return pretrain.run(compose("pretrain", settings, run_dir=run_dir), StopSignal())


def table(*names, seed=0, blocks=BLOCKS):
    random = np.random.default_rng(seed)
    vector_NV = np.stack([random.normal(size=6) for _ in names]).astype(np.float32)
    return FeatureTable(names, vector_NV, blocks, "table")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, toy_store_path):
    """A run with features of all drugs but D, whose file is gone when it is done."""
    folder = tmp_path_factory.mktemp("unseen")
    (folder / "split.toml").write_text(SPLIT)
    features = folder / "features.npz"
    table("drugA", "drugB", "drugC").write(features)
    changes = (f"data.split={folder / 'split.toml'}", f"data.perturbation_features={features}")
    assert train(folder / "run", toy_store_path, *changes) == 0
    features.unlink()
    return folder


def predicted(folder, cells, label, **options):
    predictor = load(folder / "run", **options)
    found = predictor.predict(cells, perturbation=label, include_control=False)
    assert set(found.obs["drug"]) == {label}
    return found


def test_a_held_out_drug_of_the_store_needs_no_file(folder, toy_store_path, tmp_path):
    settings = [f"checkpoint={folder / 'run'}", f"store={toy_store_path}"]
    assert predict.run(compose("predict", settings, run_dir=tmp_path)) == 0
    cells = ad.read_h5ad(tmp_path / "predicted.h5ad")
    treated = cells[~cells.obs["is_control"].to_numpy(bool)]
    assert set(treated.obs["drug"]) == {HELD_OUT}
    assert not treated.obs["seen_in_training"].any()
    assert cells.obs.loc[cells.obs["is_control"].astype(bool), "seen_in_training"].all()
    predictor = scale.load(folder / "run")
    assert predictor.vocabulary.described == ("drugC",)
    held = predictor.model.condition.features.feature_CV
    rows = [predictor.vocabulary.row_of[name] for name in ("drugA", "drugB", "drugC")]
    expected = table("drugA", "drugB", "drugC").rows(["drugA", "drugB", "drugC"])
    np.testing.assert_array_equal(held[rows].numpy(), expected)
    assert int(held.any(1).sum()) == 3


def test_a_new_name_with_the_features_of_another_is_the_unknown_with_these(
    folder, toy_anndata, tmp_path
):
    same, other = table("new", "spare", "twin"), table("spare", "new")
    vector_NV = np.stack([table("a", "b", "drugC").vector_NV[2]] * 2)
    FeatureTable(("twin", "drugA"), vector_NV, BLOCKS, "t").write(tmp_path / "twin.npz")
    twin = predicted(
        folder,
        toy_anndata,
        "[('twin', 0.5, 'uM')]",
        perturbation_features=tmp_path / "twin.npz",
    )
    assert not twin.obs["seen_in_training"].any()
    known = load(folder / "run", perturbation_features=tmp_path / "twin.npz")
    condition, row_of = known.model.condition, known.vocabulary.row_of
    features = condition.features.feature_CV
    # what the file says of a trained drug is not believed over what the training was told
    assert not features[row_of["drugA"]].equal(features[row_of["twin"]])
    assert features[row_of["drugC"]].equal(features[row_of["twin"]])
    found = {}
    for name, made in (("same", same), ("other", other)):
        made.write(tmp_path / f"{name}.npz")
        options = {"perturbation_features": tmp_path / f"{name}.npz"}
        found[name] = predicted(folder, toy_anndata, NEW, **options).X
        # what was known stays what it was
        plain = predicted(folder, toy_anndata, HELD_OUT)
        again = predicted(folder, toy_anndata, HELD_OUT, **options)
        assert (plain.X != again.X).nnz == 0
    assert np.abs((found["same"] - found["other"]).toarray()).max() > 1e-4


def test_combinations_of_seen_and_new_are_predicted_and_marked(folder, toy_anndata, tmp_path):
    table("new", seed=3).write(tmp_path / "new.npz")
    predictor = load(folder / "run", perturbation_features=tmp_path / "new.npz")
    labels = [
        "[('drugA', 0.5, 'uM'), ('drugB', 0.5, 'uM')]",
        "[('drugB', 0.5, 'uM'), ('drugD', 0.05, 'uM')]",
        "[('drugB', 0.5, 'uM'), ('new', 0.5, 'uM')]",
    ]
    found = predictor.predict(toy_anndata, perturbation=labels, include_control=False)
    seen = found.obs.groupby("drug", observed=True)["seen_in_training"].unique()
    assert [bool(seen[label].item()) for label in labels] == [True, False, False]
    assert found.uns["scale"]["feature_sha256"] == table("new", seed=3).sha256


def test_what_is_neither_trained_nor_described_stays_an_error(folder, toy_anndata, tmp_path):
    with pytest.raises(ValueError, match=r"'drugF' was not seen.*no feature; did you mean 'drug"):
        predicted(folder, toy_anndata, "[('drugF', 0.5, 'uM')]")
    table("new", blocks=({"kind": "morgan", "size": 6},)).write(tmp_path / "other.npz")
    with pytest.raises(PlanError, match=r"other\.npz holds morgan \(6\) of 1 names.*like=FILE"):
        load(folder / "run", perturbation_features=tmp_path / "other.npz")


def test_a_model_without_features_refuses_them(toy_store_path, tmp_path):
    assert train(tmp_path / "plain", toy_store_path, "trainer.max_steps=1") == 0
    table("new").write(tmp_path / "new.npz")
    with pytest.raises(ValueError, match=r"trained without features .*new\.npz"):
        load(tmp_path / "plain", perturbation_features=tmp_path / "new.npz")


def test_a_run_goes_on_with_its_features_and_not_with_others(folder, toy_store_path, tmp_path):
    features = tmp_path / "moved.npz"
    table("drugA", "drugB", "drugC", seed=1).write(features)
    changes = (f"data.split={folder / 'split.toml'}", f"data.perturbation_features={features}")
    with pytest.raises(PlanError, match=r"moved\.npz has changed since the run began"):
        train(folder / "run", toy_store_path, "trainer.max_steps=5", *changes)
    table("drugA", "drugB", "drugC").write(features)
    before = load(folder / "run").model.condition
    assert train(folder / "run", toy_store_path, "trainer.max_steps=5", *changes) == 0
    after = load(folder / "run").model.condition
    assert after.features.feature_CV.equal(before.features.feature_CV)
    assert not after.component_table.equal(before.component_table)


def test_finetune_keeps_features_and_starts_at_what_they_predict(
    folder, toy_store_path, toy_anndata, tmp_path
):
    """A drug that was known by its features alone is trained on: nothing jumps before that."""
    table("drugD", seed=5).write(tmp_path / "more.npz")
    settings = [
        *(f"start_from={folder / 'run'}", f"data.store={toy_store_path}", "trainer=cpu"),
        *("trainer.max_steps=1", "trainer.sets_per_batch=4", "optimizer.lr=1e-30"),
        f"data.perturbation_features={tmp_path / 'more.npz'}",
    ]
    run_dir = tmp_path / "run"
    assert finetune.run(compose("finetune", settings, run_dir=run_dir), StopSignal()) == 0
    before, after = load(folder / "run"), load(run_dir)
    assert "drugC" in after.vocabulary.components
    assert after.vocabulary.described == ()
    ours, theirs = (p.model.condition.features.feature_CV for p in (after, before))
    for name in ("drugA", "drugC"):
        place, origin = after.vocabulary.row_of[name], before.vocabulary.row_of[name]
        assert ours[place].equal(theirs[origin])
    assert ours[after.vocabulary.row_of["drugD"]].any()
    np.testing.assert_allclose(
        predicted(tmp_path, toy_anndata, HELD_OUT).X.toarray(),
        predicted(folder, toy_anndata, HELD_OUT).X.toarray(),
        atol=1e-5,
    )
