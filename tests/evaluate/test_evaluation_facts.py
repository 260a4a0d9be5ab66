"""Facts of a report: told where runs, stores and files tell them, else left to be unknown."""

import json
import shutil

import anndata as ad
import numpy as np
import pytest
from report_page import Page, evaluate_screen

from scale.config import EvaluateConfig, Profile, ProtocolConfig, compose, to_yaml
from scale.data.split import Split, write_few_shot
from scale.data.store import CellSetStore
from scale.evaluate import page as pages
from scale.evaluate.provenance import in_words, of_predictions, provenance
from scale.evaluate.report import Report
from scale.tasks.evaluation_facts import command, of_store, of_training


@pytest.fixture(scope="module")
def store(toy_store_path):
    return CellSetStore.open(toy_store_path)


def test_the_command_is_that_of_any_machine(tmp_path):
    config = EvaluateConfig(
        name="mine",
        run_dir=str(tmp_path),
        predicted=[f"a={tmp_path / 'a.h5ad'}", f"b={tmp_path / 'b.h5ad'}"],
        observed=str(tmp_path / "store"),
        unit_key="donor",
        protocol=ProtocolConfig(profile=Profile.cell_eval, min_cells=2, cache=str(tmp_path / "c")),
        seed=3,
    )
    assert command(config) == (
        "scale evaluate 'predicted=[a=a.h5ad,b=b.h5ad]' observed=store unit_key=donor seed=3 "
        "protocol=cell_eval protocol.min_cells=2 protocol.cache=c"
    )


@pytest.mark.parametrize(("rules", "fewest"), [("strict", 30), ("cell_eval", 2)])
def test_claims_ask_for_more_cells_than_cell_eval(rules, fewest, tmp_path):
    settings = ["predicted=a.h5ad", "observed=b.h5ad", f"protocol={rules}"]
    assert compose("evaluate", settings, run_dir=tmp_path).protocol.min_cells == fewest


def run_of(folder, split, **settings):
    """The files of a training run that are read."""
    folder.mkdir()
    shutil.copyfile(split, folder / "split.toml")
    overrides = [f"data.split={split}", *(f"{key}={value}" for key, value in settings.items())]
    (folder / "config.yaml").write_text(to_yaml(compose("pretrain", overrides, run_dir=folder)))
    start = {"task": "pretrain", "seed": 7}
    (folder / "run.json").write_text(json.dumps({"starts": [start]}))
    return folder


def test_controls_of_held_out_contexts_are_told_by_the_run(store, tmp_path):
    few, zero = tmp_path / "few.toml", tmp_path / "zero.toml"
    write_few_shot(few, store, ["A549", "K562"], train_fraction=0.4, val_fraction=0.2, seed=0)
    name = few.read_text().split("[training]")[1].split("=")[0].strip().strip('"')
    zero.write_text(
        f'[datasets]\n{name} = "."\n\n[training]\n{name} = "train"\n\n'
        f'[zeroshot]\n"{name}.A549" = "test"\n'
    )
    for file, rule, told in (
        (few, "shared", "yes"),
        (few, "excluded", "yes"),  # a few-shot context is trained on, with its controls
        (zero, "shared", "yes"),
        (zero, "excluded", "no"),
    ):
        split = Split.read(file)
        run = run_of(tmp_path / "run", file, **{"data.heldout_controls": rule})
        found = of_training(run, store, split)
        assert found["held_out_controls_in_training"] == told, (file.name, rule)
        assert found["training_seed"] == 7
        other = Split.read(few if file is zero else zero)
        for known in (of_training(run, store, other), of_training(run, None, None)):
            assert "held_out_controls_in_training" not in known
        shutil.rmtree(run)
    assert of_training(tmp_path, store, split) == {}


def test_genes_are_chosen_on_what_the_store_says(store):
    made = json.loads((store.path / "prepare.json").read_text())["provenance"]
    found = of_store(store)
    assert ("genes_chosen_on" in found) == ("genes_fit_on" in made)


def test_predictions_tell_the_weights_they_come_from(tmp_path):
    cells = ad.AnnData(np.zeros((2, 2), np.float32))
    cells.uns["scale"] = {
        "version": "1.0",
        "weights_sha256": "ab12",
        "seed": 5,
        "num_steps": 16,
        "guidance": 1.5,
    }
    cells.write_h5ad(tmp_path / "mine.h5ad")
    other = ad.AnnData(np.zeros((2, 2), np.float32))
    found = of_predictions({"mine": tmp_path / "mine.h5ad", "again": cells, "other": other})
    assert found["checkpoint"] == {"mine": "ab12", "again": "ab12", "other": "unknown"}
    assert found["prediction_seed"]["mine"] == "5"
    words = in_words(provenance({"profile": "strict"}, found))
    assert words["sampling"].startswith("mine version 1.0, steps 16, guidance 1.5; again ")
    assert of_predictions({"other": other}) == {}


ALWAYS_TOLD = {
    "profile",
    "contexts",
    "control_rule",
    "control_floor",
    "undefined",
    "normalize",
    "target_sum",
    "genes_sha256",
    "split",
    "split_sha256",
    "observed_sha256",
    "predicted_sha256",
    "train_sha256",
    "held_out_controls_in_training",
    "genes_chosen_on",
    "checkpoint",
    "training_seed",
    "prediction_seed",
    "seed",
    "versions",
    "command",
    "num_conditions",
}


def test_every_fact_is_told_and_what_is_not_known_is_called_so():
    report = Report(evaluate_screen(), meta={"split": "mine.toml", "checkpoint": {"model": "ab12"}})
    assert set(report.meta) >= ALWAYS_TOLD
    unknown = {name for name, value in report.meta.items() if value == "unknown"}
    assert unknown == {
        "split_sha256",
        "part",
        "held_out_controls_in_training",
        "genes_chosen_on",
        "training_seed",
        "prediction_seed",
        "target_sum",
        "command",
    }
    part = report.markdown().split("## How it was made")[1]
    for line in (
        "protocol: strict",
        "controls of held-out contexts in training: unknown",
        "undefined values: left out for every method where the data has no answer",
        "normalised here: no: the files hold log1p values",
        "split: mine.toml",
        "weights, SHA-256: model ab12",
        f"gene list, SHA-256: {report.meta['genes_sha256']}",
    ):
        assert f"- {line}" in part
    facts = pages.in_words(report.meta)
    html = Page(
        pages.build(report.findings, report.subject, [], title="", subtitle="", meta=report.meta)
    )
    assert all(f"{name} {value}" in html.text for name, value in facts.items())
