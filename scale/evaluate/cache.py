"""Gene tables of observed cells, kept in a folder from one evaluation to the next.

What an evaluation spends its time on is the gene test of the observed cells and of their split
halves, which is the same for every model. A table is found by the hash of all that it is made of:
a change of cells, labels, genes, controls, rules or of the code of the test finds nothing, and what
is found is what would be computed, bit for bit. A file's name ends in the checksum of its content.

Shapes: P = conditions, G = genes.
"""

from __future__ import annotations

import inspect
import logging
import os
import tempfile
from collections.abc import Sequence
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sp

from scale.evaluate import sides, statistics
from scale.evaluate.sides import GeneTables, gene_tables
from scale.evaluate.statistics import GeneTests

logger = logging.getLogger(__name__)

_SUFFIX = ".parquet"
_CHECKSUM = 16


class TableCache:
    """A folder of gene tables.

    Runs may share it at the same time: files appear whole or not at all, and never change.

    Parameters
    ----------
    folder
        Made where it is not there.
    names
        Names that every table depends on: genes, rules.

    Raises
    ------
    ValueError
        If the folder cannot be made.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"protocol.cache={folder} cannot be made ({error}); give a folder that can be "
                "written to, or null"
            ) from error
        self.folder = folder
        self._base = sha256(_code())
        self._base.update(_joined(names))
        self.num_found = self.num_made = 0

    def gene_tables(
        self, conditions: Sequence[sp.csr_matrix], control: sp.csr_matrix, names: Sequence[str]
    ) -> GeneTables:
        """Return the tables of :func:`scale.evaluate.sides.gene_tables`, made once.

        Parameters
        ----------
        conditions, control
            Cells of each condition, and the control cells they are tested against.
        names
            What the cells are: context, part, labels of the conditions.
        """
        key = self._key(conditions, control, names)
        tables = self._read(key, (len(conditions), control.shape[1]))
        if tables is None:
            tables = gene_tables(conditions, control)
            self._write(key, tables)
            self.num_made += 1
        else:
            self.num_found += 1
        return tables

    def _key(
        self, conditions: Sequence[sp.csr_matrix], control: sp.csr_matrix, names: Sequence[str]
    ) -> str:
        found = self._base.copy()
        found.update(_joined(names))
        arrays: list[npt.NDArray[Any]] = []
        for cells in (control, *conditions):
            arrays += [np.array(cells.shape), cells.indptr, cells.indices, cells.data]
        for array in arrays:
            found.update(f"{array.dtype.str}{array.shape}".encode())
            found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()

    def _read(self, key: str, shape_PG: tuple[int, int]) -> GeneTables | None:
        for path in sorted(self.folder.glob(f"{key}.*{_SUFFIX}")):
            try:
                content = path.read_bytes()
            except FileNotFoundError:  # another run found it damaged
                continue
            if _checksum(content) == path.name.split(".")[1]:
                return _decode(content, shape_PG)
            logger.warning("%s is damaged and is made again", path)
            path.unlink(missing_ok=True)
        return None

    def _write(self, key: str, tables: GeneTables) -> None:
        content = _encode(tables)
        path = self.folder / f"{key}.{_checksum(content)}{_SUFFIX}"
        try:
            number, name = tempfile.mkstemp(dir=self.folder, prefix=".", suffix=".part")
            try:
                with os.fdopen(number, "wb") as file:
                    file.write(content)
                Path(name).replace(path)
            except OSError:
                Path(name).unlink(missing_ok=True)
                raise
        except OSError as error:
            logger.warning("%s is not kept: %s", path, error)


def _code() -> bytes:
    """What computes the tables: the text of two modules, and versions of what they call."""
    versions = [f"{name} {version(name)}" for name in ("numpy", "scipy")]
    return _joined([inspect.getsource(statistics), inspect.getsource(sides), *versions])


def _joined(names: Sequence[str]) -> bytes:
    """Bytes that no other sequence of names has."""
    return "".join(f"{len(name)}:{name}" for name in names).encode()


def _checksum(content: bytes) -> str:
    return sha256(content).hexdigest()[:_CHECKSUM]


def _encode(tables: GeneTables) -> bytes:
    """One row per condition and gene."""
    tests = tables.tests
    columns: dict[str, npt.NDArray[Any]] = {
        "mean": tables.mean_PG,
        "variance": tables.variance_PG,
        "zero_share": tables.zeros_PG,
        "p_value": tests.p_PG,
        "fdr": tests.fdr_PG,
        "log2_fold_change": tests.lfc_PG,
    }
    sink = pa.BufferOutputStream()
    table = pa.table({name: values.reshape(-1) for name, values in columns.items()})
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=1,
        use_dictionary=False,
        write_statistics=False,
    )
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _decode(content: bytes, shape_PG: tuple[int, int]) -> GeneTables:
    table = pq.read_table(pa.BufferReader(content))

    def column(name: str) -> npt.NDArray[Any]:
        return np.array(table.column(name).to_numpy()).reshape(shape_PG)

    return GeneTables(
        mean_PG=column("mean"),
        variance_PG=column("variance"),
        zeros_PG=column("zero_share"),
        tests=GeneTests(
            p_PG=column("p_value"),
            fdr_PG=column("fdr"),
            lfc_PG=column("log2_fold_change"),
        ),
    )
