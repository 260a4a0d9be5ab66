"""Features of perturbations: a file of vectors by name, which training and prediction read.

An ``.npz`` without pickle that ``scale features`` makes: ``names`` [N], ``vectors`` [N, V] float32,
``blocks`` (json: what each run of columns is and how it was made) and ``sha256`` of these three.
A name without a vector is not in the file; a row of zeros would say the same and is refused.

Shapes: N = names, V = numbers of a vector, C = components that a vocabulary knows.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Self
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from scale.runtime import atomic_path
from scale.types import CONTROL_COMPONENT, PlanError, SourceError, Vocabulary, did_you_mean

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]
_ARRAYS = ("names", "vectors", "blocks", "sha256")


@dataclass(frozen=True)
class FeatureTable:
    """Vectors by name of a perturbation's component.

    Parameters
    ----------
    names
        Agents, each once.
    vector_NV
        Their vectors as they were made; finite, none of zeros alone.
    blocks
        One record per run of columns: ``kind``, ``size``, and how it was made. Vectors of two
        tables mean the same where these are equal.
    origin
        What an error calls the table: its file.

    Raises
    ------
    SourceError
        Naming the table and the first defect.
    """

    names: tuple[str, ...]
    vector_NV: Floats
    blocks: tuple[Mapping[str, Any], ...]
    origin: str

    def __post_init__(self) -> None:
        shape = (len(self.names), sum(int(block["size"]) for block in self.blocks))
        if self.vector_NV.shape != shape:
            self._refuse(f"vectors have shape {self.vector_NV.shape}, expected {shape}")
        if not self.names:
            self._refuse("it has no names")
        if len(set(self.names)) < len(self.names):
            twice = next(name for i, name in enumerate(self.names) if name in self.names[:i])
            self._refuse(f"{twice!r} is there more than once")
        if not np.isfinite(self.vector_NV).all():
            row = int(np.flatnonzero(~np.isfinite(self.vector_NV).all(1))[0])
            self._refuse(f"the vector of {self.names[row]!r} holds NaN or infinite numbers")
        if not self.vector_NV.any(1).all():
            row = int(np.flatnonzero(~self.vector_NV.any(1))[0])
            self._refuse(f"the vector of {self.names[row]!r} is zero; leave the name out")

    def _refuse(self, defect: str) -> None:
        raise SourceError(f"{self.origin}: {defect}")

    @cached_property
    def sha256(self) -> str:
        """Hash of names, vectors and blocks."""
        digest = sha256("\n".join(self.names).encode())
        digest.update(np.ascontiguousarray(self.vector_NV, dtype="<f4").tobytes())
        digest.update(_canonical(self.blocks).encode())
        return digest.hexdigest()

    def write(self, path: Path) -> None:
        """Write the table; the file appears when it is complete."""
        with atomic_path(path) as temporary, temporary.open("wb") as handle:
            np.savez_compressed(
                handle,
                names=np.array(self.names, dtype=np.str_),
                vectors=np.asarray(self.vector_NV, dtype=np.float32),
                blocks=np.array(_canonical(self.blocks)),
                sha256=np.array(self.sha256),
            )

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what :meth:`write` wrote; nothing of it is unpickled.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        SourceError
            If it is damaged or no table of features.
        """
        if not path.is_file():
            raise FileNotFoundError(f"no file {path} with features of perturbations")
        arrays = read_arrays(path, _ARRAYS)
        try:
            blocks = tuple(json.loads(str(arrays["blocks"])))
            names = tuple(str(name) for name in arrays["names"])
            table = cls(names, arrays["vectors"].astype(np.float32), blocks, str(path))
        except (TypeError, KeyError, json.JSONDecodeError) as error:
            raise SourceError(f"{path} is damaged: its blocks cannot be read ({error})") from error
        if table.sha256 != str(arrays["sha256"]):
            raise SourceError(
                f"{path} is damaged: its content has sha256 {table.sha256[:12]}.., expected "
                f"{str(arrays['sha256'])[:12]}..; make it again with scale features"
            )
        return table

    def rows(self, names: Sequence[str]) -> Floats:
        """Return what a model reads of these names [N, V]: zeros where there is no vector.

        Each block of a vector has the length 1, so that a fingerprint of many bits and a label of
        one weigh the same, and numbers of any unit will do; all of it is brought to a mean square
        of about 1 per number.
        """
        row_of = {name: row for row, name in enumerate(self.names)}
        row_N = np.array([row_of.get(name, -1) for name in names], dtype=np.int64)
        read_NV = self.vector_NV[row_N]
        read_NV[row_N < 0] = 0
        start = 0
        for block in self.blocks:
            part_NV = read_NV[:, start : start + int(block["size"])]
            length_N1 = np.linalg.norm(part_NV, axis=1, keepdims=True)
            part_NV /= np.where(length_N1 > 0, length_N1, 1)
            start += part_NV.shape[1]
        read_NV *= np.float32(np.sqrt(start / len(self.blocks)))
        return read_NV

    def describe(self) -> str:
        """Return what the numbers are, in words."""
        kinds = " + ".join(f"{block['kind']} ({block['size']:,})" for block in self.blocks)
        return f"{kinds} of {len(self.names):,} names"


def _canonical(blocks: Iterable[Mapping[str, Any]]) -> str:
    return json.dumps(list(blocks), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def read_arrays(path: Path, names: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
    """Return arrays of an ``.npz`` by name, without unpickling anything.

    Raises
    ------
    SourceError
        If the file is damaged or lacks one of them.
    """
    try:
        with np.load(path, allow_pickle=False) as handle:
            missing = sorted(set(names) - set(handle.files))
            if missing:
                raise SourceError(
                    f"{path} lacks the arrays {', '.join(missing)}; expected an .npz with "
                    f"{', '.join(names)}, as scale features makes it"
                )
            return {name: handle[name] for name in names}
    except (BadZipFile, EOFError, OSError, ValueError, AttributeError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{path} is damaged or no .npz without pickle ({error})") from error


# --- vocabularies ---------------------------------------------------------------------------------


def read_features(path: str | None) -> FeatureTable | None:
    """Return the table of a file; None where none is asked for."""
    return None if path is None else FeatureTable.read(Path(path))


def describe_names(vocabulary: Vocabulary, table: FeatureTable, names: Iterable[str]) -> Vocabulary:
    """Return a vocabulary that knows, of these names, the ones that have features.

    Parameters
    ----------
    vocabulary
        One without features, or one whose model was trained with features of the same blocks.
    table
        Features.
    names
        Agents that may be asked for beside those of the vocabulary.

    Raises
    ------
    PlanError
        If the blocks differ, or no name has features.
    """
    known = vocabulary.feature_blocks
    if known and _canonical(known) != _canonical(table.blocks):
        raise PlanError(
            f"{table.origin} holds {table.describe()}; the model was trained with "
            f"{_canonical(known)[:200]}: make the file with scale features like=FILE, where FILE "
            "is the one of the training"
        )
    trained = set(vocabulary.components[: CONTROL_COMPONENT + 1])
    asked = {*vocabulary.components, *vocabulary.described, *names} - trained
    described = (asked & set(table.names)) | set(vocabulary.described)
    if asked and not described:
        example = sorted(asked)[0]
        raise PlanError(
            f"{table.origin} has features of none of the {len(asked):,} perturbations, as "
            f"{example!r}; {did_you_mean(example, table.names)}"
        )
    return replace(
        vocabulary,
        feature_blocks=table.blocks,
        feature_sha256=table.sha256,
        described=tuple(sorted(described - set(vocabulary.components))),
    )


def check_features(path: str | None, vocabulary: Vocabulary) -> None:
    """Refuse a file that is not the one whose features a vocabulary has.

    Raises
    ------
    PlanError
        Naming both hashes.
    """
    table = read_features(path)
    if table is not None and table.sha256 != vocabulary.feature_sha256:
        raise PlanError(
            f"{path} has changed since the run began: sha256 {table.sha256[:12]}.., the checkpoint "
            f"names {str(vocabulary.feature_sha256)[:12]}..; put the old file back, or give "
            "another name="
        )


def feature_rows(table: FeatureTable, vocabulary: Vocabulary) -> Floats:
    """Return the features of all components that a vocabulary knows [C, V]; specials have none."""
    specials = CONTROL_COMPONENT + 1
    named = (*vocabulary.components[specials:], *vocabulary.described)
    return np.concatenate(
        [np.zeros((specials, vocabulary.num_features), np.float32), table.rows(named)]
    )
