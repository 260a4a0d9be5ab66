"""Features of perturbations made from a table: fingerprints of SMILES, labels, ready vectors.

Apart from ``features`` because it runs once, when a file is made: only here is RDKit needed.

Shapes: N = names, V = numbers of a vector.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scale.config import FeaturesConfig
from scale.data.features import FeatureTable, Floats, read_arrays
from scale.types import SourceError, did_you_mean

logger = logging.getLogger(__name__)

Block = tuple[dict[str, Any], Floats]
"""What a run of columns is, and its numbers [N, V]."""


def make_features(config: FeaturesConfig) -> FeatureTable:
    """Return the features that the settings ask for.

    Raises
    ------
    SourceError
        If the input cannot be used; the message names file, row and column. Also if fingerprints
        are asked for and RDKit is not installed.
    """
    path, like = Path(config.input), None
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if config.like is not None:
        like = FeatureTable.read(Path(config.like)).blocks
    if path.suffix == ".npz":
        names, blocks = _of_arrays(path)
    else:
        table = _read_table(path, config.name_column)
        names, blocks = list(table.index), _of_table(table, path, config, like)
    made = tuple(block for block, _ in blocks)
    if like is not None and list(like) != list(made):
        kinds = [" + ".join(f"{b['kind']} ({b['size']})" for b in some) for some in (made, like)]
        raise SourceError(
            f"{path} gives {kinds[0]}, like={config.like} holds {kinds[1]}; give the columns and "
            "settings that it was made with"
        )
    vector_NV = np.concatenate([vectors for _, vectors in blocks], axis=1)
    kept = np.flatnonzero(vector_NV.any(1))
    if left_out := sorted(set(range(len(names))) - set(kept.tolist())):
        logger.warning(
            "%d of %d names have no feature and are left out: %s",
            len(left_out),
            len(names),
            ", ".join(names[i] for i in left_out[:5]) + (", ..." if len(left_out) > 5 else ""),
        )
    return FeatureTable(tuple(names[i] for i in kept), vector_NV[kept], made, str(path))


def _of_arrays(path: Path) -> tuple[list[str], list[Block]]:
    arrays = read_arrays(path, ("names", "vectors"))
    vector_NV = arrays["vectors"]
    if vector_NV.ndim != 2 or vector_NV.dtype.kind not in "fiub":
        raise SourceError(
            f"{path}: vectors is {vector_NV.dtype} of shape {vector_NV.shape}; expected numbers "
            "of shape [names, length]"
        )
    names = [str(name).strip() for name in arrays["names"]]
    block = {"kind": "vector", "size": int(vector_NV.shape[1])}
    return names, [(block, vector_NV.astype(np.float32))]


def _read_table(path: Path, name_column: str) -> pd.DataFrame:
    """Return the table as text, by name; empty cells are missing."""
    separator = {".csv": ",", ".tsv": "\t", ".txt": "\t"}.get(path.suffix.lower())
    if separator is None:
        raise SourceError(f"{path} ends in {path.suffix!r}; expected .csv, .tsv or .npz")
    table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False)
    _check_columns(table, [name_column], path)
    table = table.apply(lambda column: column.str.strip())
    if (table[name_column] == "").any():
        row = int(np.flatnonzero(table[name_column] == "")[0])
        raise SourceError(f"{path}: row {row + 2} has no name in column {name_column!r}")
    if table[name_column].duplicated().any():
        twice = table.loc[table[name_column].duplicated(), name_column].iloc[0]
        raise SourceError(f"{path}: {twice!r} is in column {name_column!r} more than once")
    by_name: pd.DataFrame = table.set_index(name_column)
    return by_name


def _check_columns(table: pd.DataFrame, names: Sequence[str], path: Path) -> None:
    for name in names:
        if name not in table:
            columns = [str(column) for column in table.columns]
            raise SourceError(f"{path} has no column {name!r}; {did_you_mean(name, columns)}")


def _of_table(
    table: pd.DataFrame,
    path: Path,
    config: FeaturesConfig,
    like: Sequence[Mapping[str, Any]] | None,
) -> list[Block]:
    asked = [*([config.smiles_column] if config.smiles_column else []), *config.label_columns]
    _check_columns(table, asked, path)
    if not asked:
        return [_vectors(table, path)]
    blocks = []
    if config.smiles_column is not None:
        radius, num_bits = config.fingerprint_radius, config.fingerprint_bits
        bits_NV = fingerprints(table[config.smiles_column], radius=radius, num_bits=num_bits)
        record = {"kind": "morgan", "size": num_bits, "radius": radius}
        blocks.append((record, bits_NV))
    for column in config.label_columns:
        known = None
        if like is not None:
            known = next((b["labels"] for b in like if b.get("column") == column), None)
        blocks.append(_labels(table[column], config.label_separator, known))
    return blocks


def _vectors(table: pd.DataFrame, path: Path) -> Block:
    """Return all columns as numbers."""
    if not len(table.columns):
        raise SourceError(f"{path} has no column beside the names; give numbers, or smiles_column")
    numbers = table.apply(lambda column: pd.to_numeric(column, errors="coerce"))
    if (wrong := numbers.isna().to_numpy()).any():
        row, column = (int(place[0]) for place in np.nonzero(wrong))
        raise SourceError(
            f"{path}: {table.iloc[row, column]!r} of {table.index[row]!r} in column "
            f"{table.columns[column]!r} is no number; name the columns that are none by "
            "smiles_column and label_columns, or remove them"
        )
    block = {"kind": "vector", "size": len(table.columns)}
    return block, numbers.to_numpy(np.float32)


def _labels(column: pd.Series, separator: str | None, known: Sequence[str] | None) -> Block:
    """Return a 1 in the column of each label of a name."""
    parts = [
        [part.strip() for part in text.split(separator) if part.strip()]
        if separator is not None
        else ([text] if text else [])
        for text in column
    ]
    found = sorted({label for labels in parts for label in labels})
    if not found:
        raise SourceError(f"column {column.name!r} has no label; leave it out of label_columns")
    labels = found if known is None else list(known)
    if new := [label for label in found if label not in labels]:
        logger.warning(
            "column %s has %d labels that the other file lacks, which say nothing here: %s",
            column.name,
            len(new),
            ", ".join(new[:5]) + (", ..." if len(new) > 5 else ""),
        )
    place = {label: i for i, label in enumerate(labels)}
    bits_NV = np.zeros((len(parts), len(labels)), np.float32)
    for row, own in enumerate(parts):
        bits_NV[row, [place[label] for label in own if label in place]] = 1
    return {
        "kind": "labels",
        "size": len(labels),
        "column": str(column.name),
        "labels": labels,
    }, bits_NV


# --- chemistry ------------------------------------------------------------------------------------


def fingerprints(smiles: pd.Series, *, radius: int, num_bits: int) -> Floats:
    """Return Morgan fingerprints as bits [N, num_bits]; zeros where the text is empty.

    Parameters
    ----------
    smiles
        Structures by name.
    radius, num_bits
        Largest neighbourhood of an atom in bonds, and length.

    Raises
    ------
    SourceError
        Naming every text that is no SMILES, up to five; or if RDKit is not installed.
    """
    fingerprint = _fingerprint(radius, num_bits)
    bits_NV = np.zeros((len(smiles), num_bits), np.float32)
    broken = []
    for row, (name, text) in enumerate(smiles.items()):
        if not text:
            continue
        on = fingerprint(text)
        if on is None:
            broken.append(f"{text!r} of {name!r}")
        else:
            bits_NV[row, on] = 1
    if broken:
        raise SourceError(
            f"{len(broken)} SMILES cannot be read: {', '.join(broken[:5])}; correct them, or empty "
            "their cells"
        )
    return bits_NV


def _fingerprint(radius: int, num_bits: int) -> Callable[[str], list[int] | None]:
    """Return a function from SMILES to the places of its bits; None where they are no SMILES."""
    try:
        from rdkit import Chem
        from rdkit.Chem.rdFingerprintGenerator import GetMorganGenerator
        from rdkit.rdBase import BlockLogs
    except ImportError as error:
        raise SourceError(
            "fingerprints of SMILES need RDKit, which is not installed: pip install "
            "'scale-virtual-cell[chemistry]'. Only making the file needs it"
        ) from error
    generator = GetMorganGenerator(radius=radius, fpSize=num_bits)

    def places(smiles: str) -> list[int] | None:
        with BlockLogs():  # what is broken stands in our message
            molecule = Chem.MolFromSmiles(smiles)
        return None if molecule is None else list(generator.GetFingerprint(molecule).GetOnBits())

    return places
