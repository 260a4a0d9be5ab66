"""Finetuning: names are appended, what was learned stays, settings that contradict are refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import RankContext, run_ranks
from training_runs import SETTINGS, pretrain, read_metrics

from scale.config import compose
from scale.runtime import EXIT_AGAIN, StopSignal
from scale.train.export import read_average, read_record
from scale.train.manifest import newest_checkpoint

FIRST = '[datasets]\ntoy = "."\n[training]\ntoy = "train"\n[zeroshot]\n"toy.K562" = "test"\n'
SECOND = """[datasets]
toy = "."
[training]
toy = "train"
[fewshot."toy.K562"]
test = ["[('drugC', 0.5, 'uM')]"]
"""


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, toy_store_path):
    """A run that has not seen K562."""
    folder = tmp_path_factory.mktemp("finetune")
    (folder / "first.toml").write_text(FIRST)
    (folder / "second.toml").write_text(SECOND)
    # no control cells as targets: those of K562 would make it known
    changes = (
        f"data.split={folder / 'first.toml'}",
        "trainer.max_steps=3",
        "checkpoint.every_steps=2",
        "data.control_fraction=0",
        "model.num_layers=2",
    )
    assert pretrain(folder / "first", toy_store_path, *changes) == 0
    return folder / "first"


def finetune(run_dir, pretrained, store, *changes, stop=None):
    from scale.tasks import finetune as task

    settings = [s for s in SETTINGS if not s.startswith("model")]
    settings += [f"start_from={pretrained}", f"data.store={store}", "trainer.max_steps=2"]
    settings.append(f"data.split={pretrained.parent / 'second.toml'}")
    return task.run(
        compose("finetune", [*settings, *changes], run_dir=run_dir), stop or StopSignal()
    )


def test_new_names_get_rows_and_old_ones_keep_theirs(pretrained, toy_store_path, tmp_path):
    run_dir = tmp_path / "second"
    # A rate of nothing: what comes out is what training began with.
    assert finetune(run_dir, pretrained, toy_store_path, "optimizer.lr=1e-30") == 0
    before, after = read_average(pretrained / "export"), read_average(run_dir / "export")
    old, new = read_record(pretrained / "export")[1], read_record(run_dir / "export")[1]
    assert new.cell_types == (*old.cell_types, "K562")
    assert new.components[: len(old.components)] == old.components
    assert new.genes == old.genes
    table = "condition.cell_type_table"
    torch.testing.assert_close(after[table][:-1], before[table])
    assert torch.cdist(after[table][-1:], before[table]).min() > 2.0  # as random rows
    for name in before.keys() - {table}:
        if before[name].shape == after[name].shape:
            torch.testing.assert_close(after[name], before[name], msg=name)
    rate = read_record(run_dir / "export")[0]
    assert rate.model == read_record(pretrained / "export")[0].model


def test_rate_is_a_third_and_frozen_encoder_stays(pretrained, toy_store_path, tmp_path):
    run_dir = tmp_path / "frozen"
    changes = ("freeze_encoder=true", "optimizer.warmup_steps=1")
    stop = StopSignal()
    stop.received = "SIGTERM"
    assert finetune(run_dir, pretrained, toy_store_path, *changes, stop=stop) == EXIT_AGAIN
    assert finetune(run_dir, pretrained, toy_store_path, *changes) == 0
    assert read_metrics(run_dir)[0]["train/lr"] == pytest.approx(8e-4 / 3)
    before, after = read_average(pretrained / "export"), read_average(run_dir / "export")
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert not any(n.startswith("encoder.") for n in changed)
    assert any(n.startswith("readout.") for n in changed)


def test_damaged_checkpoint_is_passed_over(pretrained, toy_store_path, tmp_path):
    start = shutil.copytree(pretrained, tmp_path / "start")
    shutil.rmtree(start / "export")  # as of a run that was killed
    (start / "checkpoints" / "step_00000003" / "weights" / ".metadata").unlink()
    run_dir = tmp_path / "second"
    split = f"data.split={pretrained.parent / 'second.toml'}"
    assert finetune(run_dir, start, toy_store_path, split, "optimizer.lr=1e-30") == 0
    log = (run_dir / "finetune.log").read_text()
    assert "step_00000003 is damaged: weights/.metadata is missing" in log
    assert "step_00000002 is whole and is taken instead" in log
    before = read_average(start / "checkpoints" / "step_00000002")
    after, name = read_average(run_dir / "export"), "encoder.genes.weight"
    torch.testing.assert_close(after[name], before[name])
    assert not torch.equal(before[name], read_average(pretrained / "export")[name])


def write_store(path, conditions, genes):
    from scale.config import Codec
    from scale.data.genes import GeneVocabulary
    from scale.data.store_writer import StoreWriter

    with StoreWriter(
        path,
        genes=GeneVocabulary(tuple(genes)),
        columns={"perturbation": "drug", "cell_type": "cell_line", "batch": "plate"},
        control="DMSO",
        codec=Codec.zstd,
        shard_bytes=1 << 20,
        provenance={},
        library={"over": "all", "num_genes": 70},
    ) as writer:
        for condition, label, counts, library in conditions:
            writer.add(condition, label, counts, library)
    return path


def test_replaced_genes_are_those_of_the_store(pretrained, toy_conditions, tmp_path):
    names = [f"gene{g:02d}" for g in range(60)]
    names[7] = "fresh"
    store = write_store(tmp_path / "store", toy_conditions, names)
    run_dir = tmp_path / "genes"
    assert finetune(run_dir, pretrained, store, "replace_genes=true", "optimizer.lr=1e-30") == 0
    assert read_record(run_dir / "export")[1].genes == tuple(names)
    before, after = read_average(pretrained / "export"), read_average(run_dir / "export")
    kept = np.arange(60) != 7
    name = "encoder.genes.weight"
    torch.testing.assert_close(after[name][:, kept], before[name][:, kept])
    assert not torch.equal(after[name][:, 7], before[name][:, 7])
    with pytest.raises(
        ValueError, match=r"would leave 1 new genes of .* \(fresh, ...\) with weights"
    ):
        finetune(tmp_path / "x", pretrained, store, "replace_genes=true", "freeze_encoder=true")


def test_layers_that_start_anew_learn_at_the_rate_of_the_model(pretrained, tmp_path, caplog):
    from scale.tasks.finetune import _check_genes, _peak_rate

    given = ["start_from=run", "data.store=atlas", "replace_genes=true"]
    config = compose("finetune", given, run_dir=tmp_path)
    record = read_record(pretrained / "export")[0]
    assert _peak_rate(config, record) == record.model.lr
    with caplog.at_level("WARNING", logger="scale.tasks.finetune"):
        _check_genes(config, ("TP53", "MYC"), ("ENSG1", "MYC"))
        assert not caplog.records
        _check_genes(config, ("TP53", "MYC"), ("ENSG1", "ENSG2"))
    assert "none of the 2 genes of atlas (ENSG1, ...) is among those of run (TP53" in caplog.text


def test_contradictions_are_refused(pretrained, toy_store_path, tmp_path):
    with pytest.raises(ValueError, match=r"objective.head is direct, .* set objective.head=resid"):
        finetune(tmp_path / "head", pretrained, toy_store_path, "objective.head=direct")
    for key, other, own in (
        ("prior", "gaussian", "control"),
        ("prediction", "velocity", "endpoint"),
    ):
        with pytest.raises(
            ValueError, match=rf"objective.{key} is {other}, .*objective.{key}={own}"
        ):
            finetune(tmp_path / key, pretrained, toy_store_path, f"objective.{key}={other}")
    with pytest.raises(ValueError, match=r"objective.space is latent, .* set objective.space=gene"):
        finetune(tmp_path / "space", pretrained, toy_store_path, "objective=scale_paper")
    with pytest.raises(FileNotFoundError, match="start_from: no run, checkpoint or export at"):
        finetune(tmp_path / "none", pretrained / "nowhere", toy_store_path, "data.split=null")
    with pytest.raises(ValueError, match=r"data.target_sum is 5000, the model was trained with 1"):
        finetune(tmp_path / "sum", pretrained, toy_store_path, "data.target_sum=5000")
    assert not torch.distributed.is_initialized()
    assert newest_checkpoint(tmp_path / "sum") is None


def cells_of_extended(context: RankContext, sizes: dict, source: str, store: str):
    """What a model whose vocabulary grew predicts for a batch of the store."""
    from scale.config import DataConfig
    from scale.data.module import training_conditions
    from scale.data.store import CellSetStore
    from scale.data.vocabulary import extend_vocabulary
    from scale.tasks.finetune import _take_weights
    from scale.tasks.training import build_model, open_data

    with context.layout(**sizes) as layout:
        record, old = read_record(Path(source))
        config = DataConfig(store=store)
        opened = CellSetStore.open(store)
        new = extend_vocabulary(old, opened, training_conditions(opened, config))
        data = open_data(config, record.model, layout, seed=0, vocabulary=new)
        model = build_model(record, new, layout, seed=1)
        _take_weights(model, Path(source), old, record, layout)
        batch = next(data.train_batches(consumed_sets=0, sets_per_batch=8))[0]
        cells = model.eval().sample(batch, num_steps=1).numpy()
        data.close()
        opened.close()
        return cells


@pytest.mark.parametrize(
    "sizes", [{"tensor_size": 2}, {"pipeline_model_parallel_size": 2}], ids=["tensor2", "pipeline2"]
)
def test_weights_move_the_same_on_shared_blocks(pretrained, toy_store_path, tmp_path, sizes):
    arguments = (str(pretrained / "export"), str(toy_store_path))
    (expected,) = run_ranks(cells_of_extended, 1, tmp_path, {}, *arguments)
    for cells in run_ranks(cells_of_extended, 2, tmp_path, sizes, *arguments):
        np.testing.assert_allclose(cells, expected, atol=1e-6)
