"""Whole runs: resume after a kill, stop on request, refusals, validation, export."""

import math
import re
import signal

import numpy as np
import pytest
import torch
from training_runs import (
    SPLIT,
    assert_same_weights,
    pretrain,
    process,
    read_metrics,
    settings,
    starts,
    wait_for,
)

from scale.runtime import EXIT_AGAIN, StopSignal
from scale.train.manifest import newest_checkpoint, read_manifest


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, toy_store_path):
    """A run of 12 steps from beginning to end, with validation."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "split.toml").write_text(SPLIT)
    run_dir = folder / "whole"
    assert pretrain(run_dir, toy_store_path, f"data.split={folder / 'split.toml'}") == 0
    return run_dir


def split_of(run_dir):
    return f"data.split={run_dir.parent / 'split.toml'}"


def test_run_directory_holds_what_it_should(uninterrupted, toy_store_path):
    names = {str(p.relative_to(uninterrupted)) for p in uninterrupted.rglob("*") if p.is_file()}
    assert {
        "config.yaml",
        "run.json",
        "metrics.jsonl",
        "pretrain.log",
        "split.toml",
        "checkpoints/last",
        "export/model.safetensors",
        "export/model.json",
        "export/vocabulary.json",
    } <= names
    kept = sorted(p.name for p in (uninterrupted / "checkpoints").iterdir())
    assert kept == ["last", "step_00000008", "step_00000012"]
    (start,) = starts(uninterrupted)
    assert start["exit_reason"] == "finished"
    assert start["layout"]["world_size"] == 1
    metrics = read_metrics(uninterrupted)
    assert [m["step"] for m in metrics] == list(range(1, 13))
    assert {"train/loss", "train/energy", "train/grad_norm", "train/lr"} <= metrics[0].keys()
    assert [m["step"] for m in metrics if "val/pearson_delta" in m] == [6, 12]


def test_console_says_what_is_about_to_happen(uninterrupted):
    log = (uninterrupted / "pretrain.log").read_text()
    for text in (
        "parameters",
        "layout: one process on cpu",
        "32 cells per step: 4 sets of 8 treated cells",
        "device cpu",
        "layers: torch SDPA",
        "dtype fp32",
        "train: ",
        "val: ",
        "step 12/12 | loss ",
        "step 12/12 | validation | energy distance",
        "finished after step 12",
    ):
        assert text in log, text


def test_stopped_and_killed_run_ends_with_the_same_bits(uninterrupted, toy_store_path, tmp_path):
    run_dir, log = tmp_path / "whole", tmp_path / "log"
    changes = (split_of(uninterrupted), "checkpoint.every_steps=1")
    command = [
        *("pretrain", *settings(toy_store_path, *changes)),
        *("name=whole", f"hydra.run.dir={run_dir}"),
    ]
    # 1. Asked to stop before the first step: it takes one, saves, and the status says "again".
    with process(log, *command) as running:
        wait_for(lambda: (run_dir / "pretrain.log").exists(), running, log)
        running.send_signal(signal.SIGUSR1)
        assert running.wait(120) == EXIT_AGAIN, log.read_text()
    assert newest_checkpoint(run_dir).name == "step_00000001"
    assert starts(run_dir)[-1]["exit_reason"] == "stopped by SIGUSR1"
    assert not (run_dir / "export").exists()
    # 2. Killed at no particular moment after it has gone on.
    with process(log, *command) as running:
        wait_for(lambda: read_metrics(run_dir)[-1]["step"] >= 4, running, log)
        running.kill()
        assert running.wait() == -signal.SIGKILL
    # 3. The same command again.
    assert pretrain(run_dir, toy_store_path, *changes) == 0
    assert_same_weights(newest_checkpoint(run_dir), newest_checkpoint(uninterrupted))
    ours, theirs = read_metrics(run_dir), read_metrics(uninterrupted)
    assert [m["step"] for m in ours] == list(range(1, 13))
    assert [m["train/loss"] for m in ours] == [m["train/loss"] for m in theirs]
    assert ours[-1]["val/energy_distance"] == theirs[-1]["val/energy_distance"]


def test_finished_run_says_so_and_more_steps_go_on(uninterrupted, toy_store_path, tmp_path):
    import shutil

    run_dir = shutil.copytree(uninterrupted, tmp_path / "whole")
    before = newest_checkpoint(run_dir)
    assert pretrain(run_dir, toy_store_path, split_of(uninterrupted)) == 0
    assert (
        "is finished (12 steps); a higher trainer.max_steps goes on"
        in (run_dir / "pretrain.log").read_text()
    )
    assert newest_checkpoint(run_dir) == before
    changes = (split_of(uninterrupted), "trainer.max_steps=14", "checkpoint.keep_last=1")
    assert pretrain(run_dir, toy_store_path, *changes) == 0
    assert newest_checkpoint(run_dir).name == "step_00000014"
    assert len(list((run_dir / "checkpoints").iterdir())) == 2
    assert [m["step"] for m in read_metrics(run_dir)] == list(range(1, 15))
    assert read_manifest(newest_checkpoint(run_dir))["consumed_sets"] == 56


def test_other_settings_under_the_same_name_are_refused(uninterrupted, toy_store_path):
    split = split_of(uninterrupted)
    with pytest.raises(
        ValueError, match=r"other settings: objective.point_weight 0.0 -> 0.5; give another name="
    ):
        pretrain(uninterrupted, toy_store_path, split, "objective.point_weight=0.5")
    with pytest.raises(ValueError, match=r"other settings: trainer.sets_per_batch 4 -> 8"):
        pretrain(uninterrupted, toy_store_path, split, "trainer.sets_per_batch=8")
    with pytest.raises(ValueError, match=r"checkpoint.resume is false; give another name="):
        pretrain(uninterrupted, toy_store_path, split, "checkpoint.resume=false")


def test_another_split_of_the_same_name_is_refused(uninterrupted, toy_store_path, tmp_path):
    import shutil

    run_dir = shutil.copytree(uninterrupted, tmp_path / "whole")
    (tmp_path / "other.toml").write_text(
        SPLIT.replace("drugB", "drugC', 0.5, 'uM')]\", \"[('drugB")
    )
    (tmp_path / "other.toml").write_text(SPLIT.replace("\"[('drugB', 0.5, 'uM')]\", ", ""))
    with pytest.raises(ValueError, match="split_sha256"):
        pretrain(
            run_dir,
            toy_store_path,
            f"data.split={tmp_path / 'other.toml'}",
            "trainer.max_steps=14",
        )


def test_damaged_checkpoint_is_passed_over(uninterrupted, toy_store_path, tmp_path, caplog):
    import shutil

    from scale.train.checkpoint import load_for_prediction

    run_dir = shutil.copytree(uninterrupted, tmp_path / "whole")
    shutil.rmtree(run_dir / "export")
    shard = run_dir / "checkpoints" / "step_00000012" / "weights" / "__0_0.distcp"
    blob = bytearray(shard.read_bytes())
    blob[len(blob) // 3] ^= 255
    shard.write_bytes(blob)
    with caplog.at_level("WARNING", logger="scale"):
        assert load_for_prediction(run_dir, torch.device("cpu")).step == 8
    assert "weights/__0_0.distcp has sha256" in caplog.text
    assert "step_00000008 is whole and is taken instead" in caplog.text
    # Written beside training, the checkpoints are the same.
    beside = "checkpoint.save_async=true"
    assert pretrain(run_dir, toy_store_path, split_of(uninterrupted), beside) == 0
    log = (run_dir / "pretrain.log").read_text()
    assert "weights/__0_0.distcp has sha256" in log
    assert re.search("resumed from .*step_00000008", log)
    assert re.search(r"saved step_00000012 in .* s beside training, which waited .* s", log)
    assert re.search(r"saved step_00000004 in [0-9.]+ s$", log, flags=re.MULTILINE)
    assert_same_weights(newest_checkpoint(run_dir), newest_checkpoint(uninterrupted))


def test_run_stops_itself_after_max_hours(toy_store_path, tmp_path):
    status = pretrain(tmp_path / "short", toy_store_path, "trainer.max_hours=1e-9")
    assert status == EXIT_AGAIN
    assert starts(tmp_path / "short")[-1]["exit_reason"] == "trainer.max_hours reached"
    assert newest_checkpoint(tmp_path / "short").name == "step_00000001"


def test_without_validation_conditions_it_says_so_once(toy_store_path, tmp_path):
    stop = StopSignal()
    stop.received = "SIGTERM"
    beside = "checkpoint.save_async=true"
    assert pretrain(tmp_path / "no_val", toy_store_path, beside, stop=stop) == EXIT_AGAIN
    assert newest_checkpoint(tmp_path / "no_val").name == "step_00000001"  # which it waited for
    log = (tmp_path / "no_val" / "pretrain.log").read_text()
    assert log.count("split has no validation conditions: training runs without validation") == 1
    assert "val/pearson_delta" not in read_metrics(tmp_path / "no_val")[-1]


@pytest.mark.parametrize("save_async", ["false", "true"])
def test_divergence_stops_before_the_update(toy_store_path, tmp_path, save_async):
    run_dir = tmp_path / "wild"
    with pytest.raises(FloatingPointError, match=r"step [2-9] .*stopped before the update"):
        pretrain(
            run_dir,
            toy_store_path,
            "optimizer.lr=1e30",
            "optimizer.warmup_steps=0",
            "checkpoint.every_steps=1",
            f"checkpoint.save_async={save_async}",
        )
    assert "NonFiniteError" in starts(run_dir)[-1]["exit_reason"]
    assert newest_checkpoint(run_dir).name == "step_00000001"
    assert not torch.distributed.is_initialized()


def test_missing_store_leaves_no_group_behind(tmp_path):
    with pytest.raises(ValueError, match="no store"):
        pretrain(tmp_path / "none", tmp_path / "nowhere")
    assert not torch.distributed.is_initialized()


def test_loaded_model_leaves_torch_as_it_was(uninterrupted):
    from scale.train.checkpoint import load_for_prediction

    loaded = load_for_prediction(uninterrupted, torch.device("cpu"))
    assert loaded.step == 12
    assert torch.zeros(1).type() == "torch.FloatTensor"
    for source in (uninterrupted / "export", uninterrupted / "checkpoints" / "step_00000012"):
        again = load_for_prediction(source, torch.device("cpu"))
        for name, weight in loaded.model.named_parameters():
            assert torch.equal(weight, again.model.get_parameter(name))


def test_validation_is_what_it_says(uninterrupted, toy_store_path):
    """The streamed scores equal those of all sets at once, on val conditions only."""
    from training_runs import config

    from scale.config import ParallelConfig, ValidationConfig
    from scale.model.losses import SetDistances, energy_loss
    from scale.runtime import World
    from scale.tasks.training import open_data
    from scale.tasks.validation import Validation
    from scale.train import parallel
    from scale.train.checkpoint import load_for_prediction

    cpu = torch.device("cpu")
    run = config(uninterrupted, toy_store_path, split_of(uninterrupted))
    layout = parallel.start(ParallelConfig(), World(0, 1, 0), seed=0, device=cpu)
    loaded = load_for_prediction(uninterrupted, cpu)
    data = open_data(run.data, run.model, layout, seed=0, vocabulary=loaded.vocabulary)
    limit = ValidationConfig(max_sets_per_condition=3)
    scores = Validation(data, limit, run.objective, sets_per_batch=2)(loaded.model, 0)
    batches = list(data.part_batches("val", max_sets_per_condition=3, sets_per_batch=100))
    (batch,) = batches
    energy, correlation = [], []
    predicted = loaded.model.sample(batch, num_steps=1)
    per_set = energy_loss(
        SetDistances.between(
            predicted, batch.treated_BSG, batch.control_mask_BS, batch.treated_mask_BS
        )
    )
    for number in batch.condition_B.unique():
        chosen = batch.condition_B == number
        energy.append(per_set[chosen].mean())
        means = [
            cells[chosen][mask[chosen]].mean(0)
            for cells, mask in (
                (predicted, batch.control_mask_BS),
                (batch.control_BSG, batch.control_mask_BS),
                (batch.treated_BSG, batch.treated_mask_BS),
                (batch.summary_BUG, batch.summary_mask_BU),
            )
        ]
        pair = np.stack([(means[0] - means[1]).numpy(), (means[2] - means[3]).numpy()])
        correlation.append(np.corrcoef(pair)[0, 1])
    assert set(batch.condition_B.tolist()) == set(data.part_conditions("val"))
    assert scores["val/energy_distance"] == pytest.approx(float(np.mean(energy)), rel=1e-5)
    assert scores["val/pearson_delta"] == pytest.approx(float(np.mean(correlation)), rel=1e-3)
    assert math.isfinite(scores["val/pearson_delta"])
    data.close()
    parallel.stop()
    parallel.stop()
