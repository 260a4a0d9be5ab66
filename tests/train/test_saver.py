"""Saves beside training, and saves that fail, on two tensor parallel ranks."""

import logging
import resource
from pathlib import Path

import pytest
from ranks import RankContext, run_ranks
from test_checkpoint import RECORD, VOCABULARY
from test_engine import make_engine, share
from training_runs import assert_same_weights

from scale.config import CheckpointConfig
from scale.train.manifest import newest_checkpoint, read_manifest
from scale.train.record import TrainingState
from scale.types import CheckpointError

STEPS = 6


def state_of(step: int) -> TrainingState:
    return TrainingState(step=step, consumed_sets=4 * step, data={"seed": 0})


def make_saver(engine, run_dir: Path, *, save_async: bool):
    from scale.train.saver import CheckpointSaver

    return CheckpointSaver(
        run_dir,
        engine,
        CheckpointConfig(save_async=save_async),
        record=RECORD,
        vocabulary=VOCABULARY,
    )


def save_each_step(context: RankContext, run_dir: str, save_async: bool):
    """Train with a checkpoint after every step; return losses and saves seen under way."""
    with context.layout(tensor_size=2) as layout:
        engine = make_engine(layout)
        saver = make_saver(engine, Path(run_dir), save_async=save_async)
        losses, under_way = [], []
        for n in range(STEPS):
            losses.append(engine.step(share(layout, n), step=n + 1, lr=1e-2).loss)
            saver.poll()
            saver.save(state_of(n + 1))
            under_way.append(len(list(Path(run_dir).glob("checkpoints/*.partial"))))
        return losses, under_way, saver.finish().name


def test_saves_beside_training_change_nothing(tmp_path):
    runs = {}
    for save_async in (False, True):
        run_dir = tmp_path / str(save_async)
        runs[save_async] = run_ranks(save_each_step, 2, tmp_path, str(run_dir), save_async)
        assert not list(run_dir.glob("checkpoints/*.partial"))
        assert newest_checkpoint(run_dir).name == f"step_{STEPS:08d}"
    for (losses, under_way, last), (beside, under_way_beside, last_beside) in zip(
        runs[False], runs[True], strict=True
    ):
        assert beside == losses
        assert last == last_beside == f"step_{STEPS:08d}"
        assert set(under_way) == {0}
        assert set(under_way_beside) <= {0, 1}
    for step in (STEPS - 1, STEPS):
        pair = [tmp_path / name / "checkpoints" / f"step_{step:08d}" for name in ("False", "True")]
        # The same bytes in every file.
        assert read_manifest(pair[0])["files"] == read_manifest(pair[1])["files"]
        assert_same_weights(*pair)


def write_late(context: RankContext, run_dir: str):
    """Write a copy of the state after two more steps."""
    from scale.train.checkpoint import CheckpointWrite

    with context.layout(tensor_size=2) as layout:
        engine = make_engine(layout)
        for n in range(STEPS):
            engine.step(share(layout, n), step=n + 1, lr=1e-2)
        write = CheckpointWrite(
            Path(run_dir),
            engine,
            state_of(STEPS),
            record=RECORD,
            vocabulary=VOCABULARY,
            in_memory=True,
        )
        for n in range(STEPS, STEPS + 2):
            engine.step(share(layout, n), step=n + 1, lr=1e-2)
        write.write()
        return str(write.finish(keep_last=1))


def test_copy_is_of_the_step_that_was_saved(tmp_path):
    run_ranks(save_each_step, 2, tmp_path, str(tmp_path / "at_once"), False)
    late = run_ranks(write_late, 2, tmp_path, str(tmp_path / "late"))[0]
    at_once = newest_checkpoint(tmp_path / "at_once")
    assert read_manifest(Path(late))["files"] == read_manifest(at_once)["files"]


def fail_at_times(context: RankContext, run_dir: str, save_async: bool):
    """Save five times, on a disk that is full for the second rank at saves 2, 4 and 5."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    log = logging.getLogger("scale.train.saver")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    folder = Path(run_dir) / "checkpoints"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    last, error = [], None
    with context.layout(tensor_size=2) as layout:
        engine = make_engine(layout)
        saver = make_saver(engine, Path(run_dir), save_async=save_async)
        for n in range(1, 6):
            engine.step(share(layout, n), step=n, lr=1e-2)
            if n in (2, 4, 5) and context.rank == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
            try:
                saver.save(state_of(n))
                while saver._running is not None:
                    saver.poll()
            except CheckpointError as caught:
                error = str(caught)
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            last.append((folder / "last").read_text().strip())
            assert not list(folder.glob("*.partial"))
        with pytest.raises(CheckpointError, match="rank 1: .*too large"):
            saver.finish()
    return last, error, told


@pytest.mark.parametrize("save_async", [False, True], ids=["at_once", "beside"])
def test_failed_save_is_told_and_the_second_in_a_row_stops(tmp_path, save_async):
    (last, error, told), other = run_ranks(
        fail_at_times, 2, tmp_path, str(tmp_path / "run"), save_async
    )
    assert [int(name.removeprefix("step_")) for name in last] == [1, 1, 3, 3, 3]
    assert "step_00000005 could not be written: rank 1: " in error
    assert "the save before it failed too, so training stops. Make room" in error
    assert other[1] == error
    failures = [line for line in told if "training goes on" in line]
    assert [line.split()[0] for line in failures] == ["step_00000002", "step_00000004"]
    assert not any("training goes on" in line for line in other[2])
    assert sum("saved step_0000000" in line for line in told) == 2
    assert read_manifest(newest_checkpoint(tmp_path / "run"))["step"] == 3
