"""model.json and state.json of a checkpoint: settings around the weights, and where a run stood.

Apart from the weights, so that they can be read without torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

from scale.config import ModelConfig, ObjectiveConfig, Precision
from scale.runtime import package_version
from scale.train.manifest import FORMAT_VERSION
from scale.types import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord:
    """model.json: the settings that rebuild a model around its weights."""

    model: ModelConfig
    objective: ObjectiveConfig
    precision: Precision

    def to_json(self) -> dict[str, Any]:
        """Return the record in types of json."""
        return {
            "format_version": FORMAT_VERSION,
            "scale": package_version(),
            "model": _plain(self.model),
            "objective": _plain(self.objective),
            "precision": self.precision.value,
        }

    @classmethod
    def read(cls, path: Path) -> ModelRecord:
        """Read what :meth:`to_json` gave.

        Raises
        ------
        CheckpointError
            If the file is missing or holds a setting that this version does not know.
        """
        record = read_json(path)
        try:
            return cls(
                model=_rebuild(ModelConfig, record["model"]),
                objective=_rebuild(ObjectiveConfig, record["objective"]),
                precision=Precision(record["precision"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            made_by = record.get("scale", "another version")
            raise CheckpointError(
                f"{path} was made by scale {made_by} and cannot be read by {package_version()} "
                f"({error})"
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """state.json: where a run stands."""

    step: int
    consumed_sets: int
    data: Mapping[str, Any]
    """Position in the plan of cell sets, as the data module gives and checks it."""

    def moved_to(self, consumed_sets: int) -> TrainingState:
        """Return the state at another position in the data."""
        return replace(self, consumed_sets=consumed_sets)


def _plain(settings: Any) -> dict[str, Any]:
    return {k: v.value if isinstance(v, Enum) else v for k, v in asdict(settings).items()}


def _rebuild(schema: type, record: Mapping[str, Any]) -> Any:
    hints = get_type_hints(schema)
    unknown = set(record) - {f.name for f in fields(schema)}
    if unknown:
        raise ValueError(f"unknown settings: {', '.join(sorted(unknown))}")
    return schema(**{key: _typed(hints[key], value) for key, value in record.items()})


def _typed(kind: Any, value: Any) -> Any:
    """Return a member of an Enum, or of ``Enum | None``, for its value."""
    for choice in get_args(kind) or (kind,):
        if value is not None and isinstance(choice, type) and issubclass(choice, Enum):
            return choice(value)
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Return a json object; a file that is missing or damaged is named in the error."""
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    return record
