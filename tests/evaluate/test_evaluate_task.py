"""The task: a store and a split in, or h5ad files; a report out, never over another one."""

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scale.config import EvaluateConfig, Profile, ProtocolConfig
from scale.data.split import write_few_shot
from scale.data.store import CellSetStore
from scale.evaluate.report import FILES, evaluate
from scale.tasks.evaluate import run

TARGET_SUM = 4000.0


@pytest.fixture(scope="module")
def store(toy_store_path):
    return CellSetStore.open(toy_store_path)


@pytest.fixture(scope="module")
def split(store, tmp_path_factory):
    path = tmp_path_factory.mktemp("split") / "split.toml"
    contexts = ["A549", "HepG2", "K562"]
    write_few_shot(path, store, contexts, train_fraction=0.4, val_fraction=0.2, seed=0)
    return path


def log_normalised(cells):
    library = cells.obs["library"].to_numpy(np.float64)
    values = sp.diags(TARGET_SUM / library) @ sp.csr_matrix(cells.X, dtype=np.float64)
    made = cells.copy()
    made.X = values.log1p().astype(np.float32).tocsr()
    made.layers["counts"] = cells.X
    return made


@pytest.fixture(scope="module")
def predicted(store, tmp_path_factory):
    """The observed cells of all conditions as a perfect prediction."""
    cells = log_normalised(store.to_anndata())
    cells.obs = cells.obs.drop(columns=["control_fold"])
    cells.obs.loc[~cells.obs["is_control"].to_numpy(), "source_cell"] = ""
    cells.uns["scale"] = {"target_sum": TARGET_SUM}
    path = tmp_path_factory.mktemp("predicted") / "predicted.h5ad"
    del cells.layers["counts"]
    cells.write_h5ad(path)
    return path


def config(run_dir, **settings):
    return EvaluateConfig(
        **{
            "name": "evaluate",
            "run_dir": str(run_dir),
            "protocol": ProtocolConfig(num_splits=1),
            **settings,
        }
    )


@pytest.fixture(scope="module")
def store_run(store, split, predicted, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    settings = {"predicted": f"mine={predicted}", "observed": str(store.path), "split": str(split)}
    assert run(config(run_dir, **settings)) == 0
    return run_dir, settings


def test_store_and_split_make_a_report(store_run, store):
    run_dir, _ = store_run
    assert set(FILES) <= {p.name for p in run_dir.iterdir()}
    meta = json.loads((run_dir / "meta.json").read_text())
    assert meta["store_fingerprint"] == store.fingerprint
    assert meta["target_sum"] == TARGET_SUM
    assert meta["num_predicted_not_scored"]["mine"] > 0  # everything was predicted
    starts = json.loads((run_dir / "run.json").read_text())["starts"]
    assert starts[-1]["exit_reason"] == "done"
    assert "predicted:" in (run_dir / "config.yaml").read_text()


def test_controls_of_their_own_batch(store_run, store, tmp_path):
    run_dir, settings = store_run
    column = store.columns["batch"]
    assert f"batch_key={column} compares" in (run_dir / "evaluate.log").read_text()
    rules = ProtocolConfig(ceiling=False, min_cells=8)
    assert run(config(tmp_path, **settings, batch_key=column, protocol=rules)) == 0
    scores = pd.read_parquet(tmp_path / "scores.parquet")
    table = store.conditions
    whole = {f"{c} / {b}" for c, b in zip(table["cell_type"], table["batch"], strict=True)}
    within = scores[scores["unit"].isin(set(table["cell_type"]))]
    assert set(within["context"]) <= whole
    assert within["context"].nunique() > within["unit"].nunique()
    assert f"batch_key={column}" in json.loads((tmp_path / "meta.json").read_text())["command"]
    assert "batch_key=" not in (tmp_path / "evaluate.log").read_text()


def test_only_held_out_conditions_are_scored(store_run, store, split):
    from scale.data.split import Split

    scores = pd.read_parquet(store_run[0] / "scores.parquet")
    part = Split.read(split).assign(store.conditions, store.perturbations, labels=store.labels)
    treated = ~store.conditions["is_control"].to_numpy(bool)
    held_out = store.conditions[(part == "test") & treated]
    expected = {
        (row.cell_type, store.labels[row.perturbation].strip()) for row in held_out.itertuples()
    }
    mine = scores[scores["method"] == "mine"]
    excluded = pd.read_csv(store_run[0] / "excluded.csv")
    found = set(zip(mine["context"], mine["perturbation"].str.strip(), strict=True))
    assert found | set(zip(excluded["context"], excluded["perturbation"], strict=True)) == expected
    assert {"additive", "context_transfer", "replicate"} <= set(scores["method"])


def test_the_store_gives_the_numbers_of_the_same_cells_as_anndata(store_run, store, split):
    from scale.data.split import Split

    run_dir, _ = store_run
    part = Split.read(split).assign(store.conditions, store.perturbations, labels=store.labels)
    is_control = store.conditions["is_control"].to_numpy(bool)
    ids = store.conditions.index
    cells = ad.read_h5ad(store_run[1]["predicted"].removeprefix("mine="))
    report = evaluate(
        {"mine": cells[cells.obs["condition"].isin(ids[(part == "test") | is_control])].copy()},
        log_normalised(store.to_anndata(list(ids[(part == "test") | is_control]))),
        train=log_normalised(store.to_anndata(list(ids[(part == "train") | is_control]))),
        perturbation_key="drug",
        cell_type_key="cell_line",
        control="DMSO",
        protocol=ProtocolConfig(num_splits=1),
    )
    written = pd.read_parquet(run_dir / "scores.parquet")
    pd.testing.assert_frame_equal(written, report.scores, check_exact=False, rtol=1e-5)


def test_a_second_report_needs_leave(store_run):
    run_dir, settings = store_run
    before = (run_dir / "report.html").read_bytes()
    with pytest.raises(FileExistsError, match="overwrite=true"):
        run(config(run_dir, **settings))
    assert (run_dir / "report.html").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": None}, r"a store needs a split .* give split=FILE\.toml"),
        ({"predicted": "nowhere.h5ad"}, r"no file nowhere\.h5ad; set predicted"),
        ({"predicted": ["a={}", "a={}"]}, "two predictions are called 'a'"),
        ({"predicted": "additive={}"}, "may not be called additive"),
        ({"observed": "{}", "split": None}, "missing perturbation_key, cell_type_key, control"),
    ],
)
def test_mistakes_are_answered(store_run, predicted, tmp_path, changes, message):
    def fill(value):
        if isinstance(value, list):
            return [fill(item) for item in value]
        return value.format(predicted) if isinstance(value, str) else value

    settings = {**store_run[1], **{key: fill(value) for key, value in changes.items()}}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(config(tmp_path, **settings))
    assert not (tmp_path / "report.html").exists()


def test_predictions_of_two_target_sums_are_refused(store_run, predicted, tmp_path):
    other = ad.read_h5ad(predicted)
    other.uns["scale"] = {"target_sum": 1e4}
    other.write_h5ad(tmp_path / "other.h5ad")
    settings = {**store_run[1], "predicted": [str(predicted), str(tmp_path / "other.h5ad")]}
    with pytest.raises(ValueError, match="different target sums"):
        run(config(tmp_path / "run", **settings))


def test_h5ad_files_need_no_store(store, predicted, tmp_path, without_pictures):
    log_normalised(store.to_anndata()).write_h5ad(tmp_path / "observed.h5ad")
    settings = {
        "predicted": str(predicted),
        "observed": str(tmp_path / "observed.h5ad"),
        "perturbation_key": "drug",
        "cell_type_key": "cell_line",
        "control": "DMSO",
        "protocol": ProtocolConfig(profile=Profile.cell_eval, ceiling=False, baselines=False),
    }
    assert run(config(tmp_path / "run", **settings)) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary) == {"model"}
    assert summary["model"]["pearson_delta"] == pytest.approx(1.0, abs=1e-5)
    assert "No baseline was scored" in (tmp_path / "run" / "report.md").read_text()


def test_one_command_gives_the_pooled_result_and_that_of_each_context(
    store, predicted, split, tmp_path, without_pictures
):
    """Both files hold counts here: they are normalised on the way."""
    counts = store.to_anndata()
    counts.obs = counts.obs.drop(columns=["control_fold"])
    counts.write_h5ad(tmp_path / "counts.h5ad")
    protocol = ProtocolConfig(
        profile=Profile.paper_pooled, normalize=TARGET_SUM, ceiling=False, baselines=False
    )
    settings = {
        "predicted": [f"a={tmp_path / 'counts.h5ad'}", f"b={tmp_path / 'counts.h5ad'}"],
        "observed": str(store.path),
        "split": str(split),
        "protocol": protocol,
    }
    run_dir = tmp_path / "run"
    assert run(config(run_dir, **settings)) == 0
    meta = json.loads((run_dir / "meta.json").read_text())
    assert meta["target_sum"] == meta["normalize"] == TARGET_SUM
    scores = pd.read_parquet(run_dir / "scores.parquet")
    assert set(scores["context"]) == {"A549", "HepG2", "K562"}
    pooled = pd.read_csv(run_dir / "pooled_over_contexts_scores.csv")
    assert set(pooled["context"]) == {"pooled over contexts"}
    assert set(pooled["method"]) == {"a", "b", "control_copy"}
    for table in (scores, pooled):
        perfect = table.query("method == 'a' and metric == 'pearson_delta'")["value"]
        assert perfect.to_numpy() == pytest.approx(np.ones(len(perfect)), abs=1e-5)
    assert "pooled over contexts" in (run_dir / "report.md").read_text().lower()
    with pytest.raises(ValueError, match=r"a: X holds fractions .* takes counts"):
        run(config(tmp_path / "logs", **{**settings, "predicted": f"a={predicted}"}))
