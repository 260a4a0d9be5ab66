"""What a report says of the making of predictions, as far as runs, stores and settings tell it.

Apart from the task because none of it changes a number: a fact that cannot be told is left out,
and the report calls it unknown.
"""

import json
import shlex
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

from scale.config import SCHEMAS, EvaluateConfig, HeldoutControls, ProtocolConfig, from_yaml
from scale.data.split import Split
from scale.data.split_file import TRAIN
from scale.data.store import CellSetStore

_OF_THE_PLACE = ("name", "run_dir", "protocol", "overwrite")
_PATHS = ("predicted", "observed", "train", "split", "training_run")
_GENES_CHOSEN_ON = {
    "all": "cells of all conditions, the held-out ones too",
    "train": "cells of training conditions only",
    None: "no cells: all genes, or a list of them",
}


def command(config: EvaluateConfig) -> str:
    """Return the command without what is of this machine: files by their names only."""
    words = []
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in _OF_THE_PLACE or value == field.default:
            continue
        if field.name in _PATHS:
            value = _name(value)
        words.append(f"{field.name}={value}")
    rules = config.protocol
    words.append(f"protocol={rules.profile.value}")
    for field in fields(ProtocolConfig):
        value = getattr(rules, field.name)
        if field.name == "profile" or value == field.default:
            continue
        value = value.value if isinstance(value, Enum) else value
        words.append(f"protocol.{field.name}={_name(value) if field.name == 'cache' else value}")
    return " ".join(["scale evaluate", *map(shlex.quote, words)])


def _name(paths: Any) -> str:
    """Return the last part of a path, of METHOD=PATH, or of each of a list."""
    if isinstance(paths, list):
        return f"[{','.join(map(_name, paths))}]"
    method, sign, path = str(paths).rpartition("=")
    return f"{method}{sign}{Path(path).name}"


def of_store(store: CellSetStore) -> dict[str, Any]:
    """Return which cells chose the genes of a store."""
    file = store.path / "prepare.json"
    made = json.loads(file.read_text())["provenance"] if file.is_file() else {}
    if "genes_fit_on" not in made:
        return {}
    return {"genes_chosen_on": _GENES_CHOSEN_ON[made["genes_fit_on"]]}


def of_training(run_dir: Path, store: CellSetStore | None, split: Split | None) -> dict[str, Any]:
    """Return what a training run tells: its seed, and whether held-out contexts gave controls.

    Parameters
    ----------
    run_dir
        Of the training.
    store, split
        Those of the evaluation; with another split than that of the run nothing is said of
        controls.
    """
    if not (run_dir / "run.json").is_file():
        return {}
    start = json.loads((run_dir / "run.json").read_text())["starts"][-1]
    facts: dict[str, Any] = {"training_run": run_dir.name, "training_seed": start["seed"]}
    own = run_dir / "split.toml"
    if (
        store is None
        or split is None
        or not own.is_file()
        or Split.read(own).sha256 != split.sha256
    ):
        return facts
    settings = from_yaml(run_dir / "config.yaml", SCHEMAS[start["task"]])
    rule: HeldoutControls = settings.data.heldout_controls
    part_C = split.assign(
        store.conditions, store.perturbations, labels=store.labels, heldout_controls=rule
    )
    is_control_C = store.conditions["is_control"].to_numpy(dtype=bool)
    context_C = store.conditions["cell_type"]
    held_out = set(context_C[(part_C != TRAIN) & ~is_control_C])
    is_seen = bool((is_control_C & (part_C == TRAIN) & context_C.isin(held_out)).any())
    return {**facts, "held_out_controls_in_training": "yes" if is_seen else "no"}
