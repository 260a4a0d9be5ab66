"""The tensors of a checkpoint as files: planned by all ranks together, written by each alone.

The files are those of Megatron-core's ``torch_dist`` format. Its own writer starts a manager
process that imports the main script again (2-7 s for the first save), forks writers from a process
with threads, and leaves orphans behind when a rank is killed. Here, what exchanges messages happens
in the thread that trains, and what takes time exchanges none: it may go on in another thread beside
the steps, without a message between two of theirs.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from scale.model.megatron_import import megatron_import

with megatron_import():
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
    from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
    from megatron.core.dist_checkpointing.strategies.torch import (
        MCoreSavePlanner,
        _replace_state_dict_keys_with_sharded_keys,
        mcore_to_pyt_state_dict,
    )


class ShardWriter:
    """One save of sharded tensors; making it is a collective of all ranks.

    Parameters
    ----------
    state
        Tensors of this rank in Megatron-core's sharded form, and plain values that are the same on
        every rank.
    folder
        Empty directory that every rank sees.
    in_memory
        Copy what this rank will write to host memory now, so that the tensors may change while it
        is written.
    """

    def __init__(self, state: dict[str, Any], folder: Path, *, in_memory: bool) -> None:
        self._folder = folder
        self._rank = dist.get_rank()
        sharded, common = save_preprocess(state)
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded, keep_only_main_replica=True
        )
        self._common = _pickled(common) if self._rank == 0 else b""
        self._files = _Files(folder, sync_files=True, per_thread_copy_ahead=0)
        self._planner = _Planner(dedup_replicated_tensors=False, flatten_state_dict=False)
        self._planner.set_up_planner(
            mcore_to_pyt_state_dict(by_key, is_loading=False), is_coordinator=self._rank == 0
        )
        self._files.set_up_storage_writer(self._rank == 0)
        self._metadata: Metadata | None = None
        self._plan: SavePlan = self._planner.finish_plan(self._share_out())
        if in_memory:
            self._planner.copy_to_memory(self._plan.items)

    def _share_out(self) -> SavePlan:
        """Return what this rank writes, out of the plans of all."""
        own = self._files.prepare_local_plan(self._planner.create_local_plan())
        plans: list[SavePlan] | None = None
        if self._rank == 0:
            plans = [own] * dist.get_world_size()
        dist.gather_object(own, plans)
        if plans is not None:
            plans, self._metadata = self._planner.create_global_plan(plans)
            plans = self._files.prepare_global_plan(plans)
        received: list[SavePlan] = [own]
        dist.scatter_object_list(received, plans)
        return received[0]

    def write(self) -> list[WriteResult]:
        """Write this rank's files, in any thread and without a message to other ranks.

        Raises
        ------
        OSError, RuntimeError
            If a file could not be written.
        """
        if self._rank == 0:
            with (self._folder / COMMON_STATE_FNAME).open("wb") as handle:
                handle.write(self._common)
                handle.flush()
                os.fsync(handle.fileno())
        written = self._files.write_data(self._plan, self._planner)
        written.wait()
        results: list[WriteResult] = written.value()
        return results

    def own_files(self) -> list[Path]:
        """Return the files that this rank wrote."""
        own = sorted(self._folder.glob(f"__{self._rank}_*"))
        return [*own, self._folder / COMMON_STATE_FNAME] if self._rank == 0 else own

    def complete(self, results: Sequence[list[WriteResult]]) -> list[Path]:
        """Write what says where each tensor is, on the first rank; return these files."""
        assert self._metadata is not None, "of the first rank"
        before = set(self._folder.iterdir())
        self._files.finish(self._metadata, list(results))
        save_config(CheckpointingConfig("torch_dist", 1), str(self._folder))
        return sorted(set(self._folder.iterdir()) - before)


class _Files(FileSystemWriter):
    """Names neither its directory nor a random number in what it writes."""

    def storage_meta(self) -> None:
        return None


class _Planner(MCoreSavePlanner):  # type: ignore[misc]
    """Gives out the tensors as they are, or as they were when they were copied."""

    _copies: dict[MetadataIndex, Tensor | io.BytesIO] | None = None

    def copy_to_memory(self, items: Sequence[WriteItem]) -> None:
        copies = {item.index: _copy(self.resolve_data(item)) for item in items}
        self._copies = copies

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if self._copies is not None:
            return self._copies[write_item.index]
        data: Tensor | io.BytesIO = super().resolve_data(write_item)
        return data


def _copy(data: Tensor | io.BytesIO) -> Tensor | io.BytesIO:
    # bytes were made for this save, nobody changes them
    return data.detach().to("cpu", copy=True) if isinstance(data, Tensor) else data


def _pickled(common: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(common, buffer)
    return buffer.getvalue()
