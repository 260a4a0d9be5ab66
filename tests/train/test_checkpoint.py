"""Checkpoints: bitwise in the same layout, close in another; whole or not there; export."""

import json
import logging
from pathlib import Path

import pytest
import torch
from ranks import RankContext, run_ranks
from test_engine import make_engine, share, weights_hash

from scale.config import ModelConfig, ObjectiveConfig, Precision
from scale.train import manifest as files
from scale.train.record import ModelRecord, TrainingState
from scale.types import CheckpointError, Vocabulary

RECORD = ModelRecord(
    model=ModelConfig(
        hidden_size=8,
        num_layers=1,
        num_heads=2,
        ffn_hidden_size=16,
        set_size=4,
        num_summary_cells=4,
        lr=1e-3,
    ),
    objective=ObjectiveConfig(),
    precision=Precision.fp32,
)
VOCABULARY = Vocabulary(
    genes=tuple(f"g{i}" for i in range(10)),
    components=("", "control", "drug"),
    cell_types=("line",),
    batches=(),
    perturbations=("drug",),
    control="DMSO",
    perturbation_key="drug",
    cell_type_key="line",
    batch_key=None,
    dose_key=None,
    separator=None,
    target_sum=1e4,
    value_scale=1.0,
)


def save(engine, run_dir: Path, step: int, keep_last: int = 2) -> Path:
    from scale.train.checkpoint import CheckpointWrite

    state = TrainingState(step=step, consumed_sets=4 * step, data={"seed": 0})
    write = CheckpointWrite(run_dir, engine, state, record=RECORD, vocabulary=VOCABULARY)
    write.write()
    return write.finish(keep_last=keep_last)


def train_and_save(context: RankContext, tensor_size: int, run_dir: str, options: dict):
    """Three steps, save, three more: the end is what a resumed run must reach."""
    with context.layout(
        tensor_size=tensor_size, distributed_optimizer=options.get("distributed", False)
    ) as layout:
        engine = make_engine(layout, **options)
        for n in range(3):
            engine.step(share(layout, n), step=n + 1, lr=1e-2)
        path = save(engine, Path(run_dir), 3)
        losses = [engine.step(share(layout, n), step=n + 1, lr=1e-2).loss for n in range(3, 6)]
        return str(path), losses, weights_hash(engine)


def load_and_train(context: RankContext, tensor_size: int, path: str, options: dict):
    from scale.train.checkpoint import load_checkpoint

    with context.layout(
        tensor_size=tensor_size, distributed_optimizer=options.get("distributed", False)
    ) as layout:
        engine = make_engine(layout, **(options | {"seed": 99}))
        state = load_checkpoint(Path(path), engine)
        assert state == TrainingState(step=3, consumed_sets=12, data={"seed": 0})
        losses = [engine.step(share(layout, n), step=n + 1, lr=1e-2).loss for n in range(3, 6)]
        return losses, weights_hash(engine)


@pytest.mark.parametrize(
    ("size", "tensor_size", "options"),
    [
        (1, 1, {}),
        (1, 1, {"precision": Precision.bf16}),
        (2, 2, {}),
        (2, 2, {"precision": Precision.bf16}),
        (2, 1, {}),
    ],
    ids=["alone", "alone_bf16", "tensor2", "tensor2_bf16", "data2"],
)
def test_same_layout_goes_on_bitwise(tmp_path, size, tensor_size, options):
    first = run_ranks(train_and_save, size, tmp_path, tensor_size, str(tmp_path), options)
    again = run_ranks(load_and_train, size, tmp_path, tensor_size, first[0][0], options)
    for (_, losses, end), (resumed, reached) in zip(first, again, strict=True):
        assert resumed == losses
        assert reached == end


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with checkpoints of steps 1 to 4, of which the last three are kept."""
    run_dir = tmp_path_factory.mktemp("run")
    run_ranks(save_four, 1, run_dir, str(run_dir))
    return run_dir


def save_four(context: RankContext, run_dir: str):
    with context.layout() as layout:
        engine = make_engine(layout)
        for n in range(4):
            engine.step(share(layout, n), step=n + 1, lr=1e-2)
            save(engine, Path(run_dir), n + 1, keep_last=3)


def flip(file: Path) -> None:
    """Change one bit."""
    blob = bytearray(file.read_bytes())
    blob[len(blob) // 2] ^= 1
    file.write_bytes(blob)


def cut(file: Path) -> None:
    """Lose the end."""
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size // 2)


def copy_run(source: Path, target: Path) -> Path:
    import shutil

    shutil.copytree(source, target)
    return target


def test_run_directory_is_what_it_says(saved):
    folder = saved / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == [
        "last",
        "step_00000002",
        "step_00000003",
        "step_00000004",
    ]
    assert (folder / "last").read_text() == "step_00000004\n"
    manifest = files.read_manifest(folder / "step_00000004")
    assert manifest["step"] == 4
    assert manifest["consumed_sets"] == 16
    assert manifest["layout"]["world_size"] == 1
    inside = {
        str(p.relative_to(folder / "step_00000004"))
        for p in (folder / "step_00000004").rglob("*")
        if p.is_file()
    }
    assert inside == {*manifest["files"], "manifest.json"}
    assert Vocabulary.read(folder / "step_00000004" / "vocabulary.json") == VOCABULARY
    assert ModelRecord.read(folder / "step_00000004" / "model.json") == RECORD
    for path in folder.rglob("*"):
        if path.is_file():
            assert str(saved).encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("weights/common.pt", flip, "has sha256"),
        ("state.json", flip, "has sha256"),
        ("weights/__0_0.distcp", flip, "has sha256"),
        ("weights/__0_0.distcp", cut, "bytes, expected"),
        ("weights/__0_0.distcp", Path.unlink, "is missing"),
        ("weights/.metadata", Path.unlink, "is missing"),
    ],
    ids=["flip-common", "flip-state", "flip-shard", "cut-shard", "no-shard", "no-metadata"],
)
def test_damage_is_named_and_the_one_before_is_used(saved, tmp_path, caplog, name, harm, message):
    from scale.train.export import find_weights

    run_dir = copy_run(saved, tmp_path / "run")
    newest = run_dir / "checkpoints" / "step_00000004"
    harm(newest / name)
    with pytest.raises(
        CheckpointError, match=f"damaged: {name} .*{message}.*; use .*step_00000003"
    ):
        files.find_checkpoint(newest)
    for find in (files.find_checkpoint, find_weights):  # to train on; to predict and to finetune
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="scale"):
            assert find(run_dir).name == "step_00000003"
        assert name in caplog.text
        assert "step_00000003 is whole and is taken instead" in caplog.text


def test_cut_missing_and_unfinished_checkpoints(saved, tmp_path):
    run_dir = copy_run(saved, tmp_path / "run")
    folder = run_dir / "checkpoints"
    with (folder / "step_00000004" / "model.json").open("r+b") as handle:
        handle.truncate(10)
    with pytest.raises(CheckpointError, match="model.json has 10 bytes, expected"):
        files.find_checkpoint(folder / "step_00000004")
    (folder / "step_00000003" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no manifest.json"):
        files.find_checkpoint(folder / "step_00000003")
    (folder / "step_00000002" / "vocabulary.json").unlink()
    with pytest.raises(CheckpointError, match=r"vocabulary.json is missing; no checkpoint of this"):
        files.find_checkpoint(folder / "step_00000002")
    (folder / "step_00000009.partial").mkdir()
    assert files.newest_checkpoint(run_dir) is None
    with pytest.raises(CheckpointError, match="has no complete checkpoint"):
        files.find_checkpoint(run_dir)


def test_other_formats_are_refused(saved, tmp_path):
    run_dir = copy_run(saved, tmp_path / "run")
    newest = run_dir / "checkpoints" / "step_00000004"
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["format_version"] = 7
    (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="has format 7 .* this version reads format 1"):
        files.find_checkpoint(newest)


def wrong_precision(context: RankContext, path: str):
    from scale.train.checkpoint import load_checkpoint

    with context.layout() as layout:
        engine = make_engine(layout, precision=Precision.bf16)
        with pytest.raises(
            CheckpointError, match=r"of fp32 blocks, this run has bf16; keep trainer.prec"
        ):
            load_checkpoint(Path(path), engine)


def test_another_precision_is_refused(saved, tmp_path):
    run_ranks(wrong_precision, 1, tmp_path, str(saved / "checkpoints" / "step_00000004"))


def place_average(context: RankContext, tensor_size: int, source: str):
    """Whole weights into a new model: the function is the one that was averaged."""
    from toy_model import ToyModel, make_batch

    from scale.train.checkpoint import place_weights
    from scale.train.export import read_average

    with context.layout(tensor_size=tensor_size):
        model = ToyModel(tensor_size=tensor_size, seed=5)
        place_weights(model, read_average(Path(source)))
        with torch.no_grad():
            return float(model(make_batch(0, 4)).total)


def averaged_loss(context: RankContext, path: str):
    from toy_model import make_batch

    from scale.train.checkpoint import load_checkpoint

    with context.layout() as layout:
        engine = make_engine(layout, seed=3)
        load_checkpoint(Path(path), engine)
        with engine.averaged_weights(), torch.no_grad():
            return float(engine.model(make_batch(0, 4)).total)


def test_export_is_the_moving_average_in_any_layout(saved, tmp_path):
    from scale.train.export import export_model, read_average

    checkpoint = saved / "checkpoints" / "step_00000004"
    export = export_model(checkpoint, tmp_path / "export")
    assert sorted(p.name for p in export.iterdir()) == [
        "model.json",
        "model.safetensors",
        "vocabulary.json",
    ]
    expected = run_ranks(averaged_loss, 1, tmp_path, str(checkpoint))[0]
    assert run_ranks(place_average, 1, tmp_path, 1, str(export)) == [expected]
    assert run_ranks(place_average, 1, tmp_path, 1, str(checkpoint)) == [expected]
    for loss in run_ranks(place_average, 2, tmp_path, 2, str(export)):
        assert loss == pytest.approx(expected, rel=1e-6)
    flip(export / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors has sha256"):
        read_average(export)


def test_newest_of_export_and_checkpoints_is_found(saved, tmp_path):
    from scale.train.export import export_model, find_weights

    run_dir = copy_run(saved, tmp_path / "run")
    assert find_weights(run_dir).name == "step_00000004"
    export_model(run_dir / "checkpoints" / "step_00000003", run_dir / "export")
    assert find_weights(run_dir).name == "step_00000004"
    export_model(run_dir / "checkpoints" / "step_00000004", run_dir / "export")
    assert find_weights(run_dir) == run_dir / "export"
    assert find_weights(run_dir / "export") == run_dir / "export"


def test_settings_of_another_version_are_named(tmp_path):
    record = RECORD.to_json()
    record["model"]["num_wings"] = 2
    (tmp_path / "model.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"cannot be read .*unknown settings: num_wings"):
        ModelRecord.read(tmp_path / "model.json")


@pytest.mark.parametrize("precision", Precision)
def test_spread_optimizer_goes_on_bitwise(tmp_path, precision):
    options = {"distributed": True, "precision": precision}
    first = run_ranks(train_and_save, 2, tmp_path, 1, str(tmp_path), options)
    again = run_ranks(load_and_train, 2, tmp_path, 1, first[0][0], options)
    for (_, losses, end), (resumed, reached) in zip(first, again, strict=True):
        assert resumed == losses
        assert reached == end


def load_stock(context: RankContext, path: str):
    """Megatron's own loading of a spread optimizer, without what is mended."""
    from megatron.core import dist_checkpointing

    from scale.train.sharded import sharded_state

    with context.layout(distributed_optimizer=True) as layout:
        engine = make_engine(layout, distributed=True)
        try:
            state = sharded_state(engine, is_loading=True)
            loaded = dist_checkpointing.load(state, path)
            engine.optimizer.load_state_dict(
                {
                    **engine.optimizer.state_dict(),
                    "param_state": loaded["optimizer"],
                    "param_state_sharding_type": "fully_reshardable",
                }
            )
        except (AssertionError, KeyError) as error:
            return type(error).__name__
        return ""


def test_loading_a_spread_optimizer_still_has_to_be_mended(tmp_path):
    options = {"distributed": True}
    path = run_ranks(train_and_save, 2, tmp_path, 1, str(tmp_path), options)[0][0]
    told = run_ranks(load_stock, 2, tmp_path, f"{path}/weights")
    assert all(told), "megatron-core loads it by itself: drop prepare_ and load_spread_state"
