"""Which tensors of a run a checkpoint holds, under which keys, and how they come back.

========================  =========================================================================
key                       tensor
========================  =========================================================================
``<weight>``              weight of the model; a layer of the stack has its number in it
``ema.<weight>``          its moving average
``optimizer.exp_avg.``,   its moments
``optimizer.exp_avg_sq.``
``optimizer.fp32.``       the fp32 copy of a bf16 weight
========================  =========================================================================

All are whole tensors in shards, whatever the layout was: optimizer state that is spread over data
parallel ranks is kept under the same keys, so that a run may go on with it whole, and the other way
round. Shapes are those of the weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scale.model.megatron_import import megatron_import
from scale.train import optim
from scale.train.export import AVERAGE
from scale.types import CheckpointError

if TYPE_CHECKING:
    from scale.train.engine import Engine

with megatron_import():
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.mapping import (
        LocalNonpersistentObject,
        ShardedTensor,
        ShardedTensorFactory,
    )

# One key per layer with its global number, so that single layers can be taken from a checkpoint.
_LAYOUT_METADATA = {
    "non_homogeneous_layers": True,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
    "distrib_optim_sharding_type": "fully_reshardable",
}
_MOMENTS = ("exp_avg", "exp_avg_sq")


def shards_of(model: Any) -> Iterator[ShardedTensor]:
    """Yield this rank's shards of a model's weights and buffers."""
    for entry in model.sharded_state_dict(metadata=dict(_LAYOUT_METADATA)).values():
        if isinstance(entry, ShardedTensorFactory):
            yield from entry.build()
        elif isinstance(entry, ShardedTensor):
            yield entry


def sharded_state(engine: Engine, *, is_loading: bool) -> dict[str, Any]:
    """Return what a checkpoint holds, in Megatron-core's sharded form; a collective of all ranks.

    Parameters
    ----------
    engine
        Its model, moving average and optimizer.
    is_loading
        Whether the entries are places to load into, and not values to save.
    """
    model: Any = engine.model
    entries = model.sharded_state_dict(metadata=dict(_LAYOUT_METADATA))
    # Buffers are no part of the average, but of the model that prediction rebuilds.
    average = {
        name: _renamed(entry, AVERAGE + entry.key, engine.average.weights.get(name, entry.data))
        for name, entry in entries.items()
        if isinstance(entry, ShardedTensor | ShardedTensorFactory)
    }
    return {
        "model": entries,
        "average": average,
        "optimizer": _spread_tensors(engine, entries, is_loading=is_loading)
        if engine.distributed_optimizer
        # Not the wrapper's own: with fp32 beside bf16 weights it takes one for the other.
        else {
            kind: {
                name: _renamed(entries[name], f"optimizer.{kind}.{entries[name].key}", tensor)
                for name, tensor in tensors.items()
            }
            for kind, tensors in _optimizer_tensors(engine).items()
        },
        "optimizer_steps": _num_updates(engine.optimizer.optimizer),
    }


def load_state(folder: Path, engine: Engine) -> None:
    """Load the tensors of a checkpoint of any layout; a collective of all ranks.

    Raises
    ------
    CheckpointError
        If they are not those of this model.
    """
    if engine.distributed_optimizer:
        optim.prepare_spread_state(engine.optimizer)
    wanted = sharded_state(engine, is_loading=True)
    try:
        with warnings.catch_warnings():
            # Megatron-core calls functions that torch has renamed.
            warnings.simplefilter("ignore", FutureWarning)
            loaded = dist_checkpointing.load(wanted, str(folder))
    except CheckpointingException as error:
        raise CheckpointError(f"{folder} does not fit this model: {error}") from error
    engine.model.load_state_dict(loaded["model"])
    with torch.no_grad():
        for name, weight in engine.average.weights.items():
            weight.copy_(loaded["average"][name])
    if engine.distributed_optimizer:
        _load_spread(engine, loaded)
        return
    with torch.no_grad():
        for kind, tensors in _optimizer_tensors(engine).items():
            for name, tensor in tensors.items():
                tensor.copy_(loaded["optimizer"][kind][name])
    for state in engine.optimizer.optimizer.state.values():
        state["step"].fill_(loaded["optimizer_steps"])


def _num_updates(adamw: torch.optim.Optimizer) -> float:
    """Return the updates so far: torch counts per weight, Transformer Engine per group."""
    counts = [float(state["step"]) for state in adamw.state.values() if "step" in state]
    counts += [float(group["step"]) for group in adamw.param_groups if "step" in group]
    return max(counts, default=0.0)


def _optimizer_tensors(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """Return moments, and fp32 copies of bf16 weights, by kind and name of the weight."""
    adamw = engine.optimizer.optimizer
    optim.initialise_state(adamw)
    tensors: dict[str, dict[str, Tensor]] = {kind: {} for kind in (*_MOMENTS, "fp32")}
    for name, parameter in engine.model.named_parameters():
        if not parameter.requires_grad:
            continue
        main = getattr(parameter, "main_param", None)
        if main is not None:
            tensors["fp32"][name] = main
        for kind in _MOMENTS:
            tensors[kind][name] = adamw.state[parameter if main is None else main][kind]
    return tensors


def _spread_tensors(
    engine: Engine, entries: Mapping[str, Any], *, is_loading: bool
) -> dict[int, dict[str, Any]]:
    """Return spread optimizer state by Megatron-core's number of the weight, and kind."""
    optimizer: Any = engine.optimizer
    _mend_order(optimizer)
    spread = optimizer.sharded_state_dict(
        entries, is_loading=is_loading, metadata=dict(_LAYOUT_METADATA)
    )
    by_key = {entry.key: entry for entry in entries.values()}
    named: dict[int, dict[str, Any]] = {}
    for number, tensors in spread["param_state"].items():
        named[number] = {}
        for kind, entry in tensors.items():
            weight = by_key[entry.key.removeprefix("optimizer.state.").partition(".")[2]]
            if kind in _MOMENTS:
                named[number][kind] = replace(entry, key=f"optimizer.{kind}.{weight.key}")
            elif weight.data.dtype is torch.float32:
                # Not written twice: what is spread is a share of the weight itself.
                named[number][kind] = LocalNonpersistentObject(weight.data)
            else:
                named[number][kind] = replace(entry, key=f"optimizer.fp32.{weight.key}")
    return named


def _mend_order(optimizer: Any) -> None:
    """Correct where Megatron-core thinks that the shares of weights stand in their groups.

    It numbers them as they stand in the buffers of gradients, but puts fp32 weights before bf16
    ones when it makes the groups: with both kinds in a group it saved and loaded the moments of
    other weights, or failed on their sizes.
    """
    optimizer.model_param_group_index_map = {
        parameter: (group, order)
        for group, kinds in enumerate(
            zip(optimizer.model_fp32_groups, optimizer.model_float16_groups, strict=True)
        )
        for order, parameter in enumerate(weight for kind in kinds for weight in kind)
    }


def _load_spread(engine: Engine, loaded: Mapping[str, Any]) -> None:
    """Put loaded optimizer state where it is spread."""
    optimizer: Any = engine.optimizer
    state = optimizer.state_dict()
    for group in state["optimizer"]["param_groups"]:
        group["step"] = int(loaded["optimizer_steps"])
    optim.load_spread_state(
        engine.optimizer,
        {
            **state,
            "param_state": loaded["optimizer"],
            "param_state_sharding_type": _LAYOUT_METADATA["distrib_optim_sharding_type"],
        },
    )


def _renamed(entry: Any, key: str, data: Tensor) -> Any:
    """Return the entry of a weight for a tensor that goes with it: same shards, own key."""
    if isinstance(entry, ShardedTensorFactory):
        return replace(entry, key=key, data=data)
    return replace(entry, key=key, data=data, dtype=data.dtype)
