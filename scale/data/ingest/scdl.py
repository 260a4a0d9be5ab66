"""A BioNeMo SCDL archive as a source of cells.

An archive may be several joined: its tables come in blocks, whose genes must be the same set but
may stand in any order, and of whose columns those are offered that all blocks have.

Shapes: N = cells of the archive, M = stored values, G = genes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sp

from scale.data.ingest.labels import merge_equal, numbers_of, text_of
from scale.data.ingest.source import LOCATIONS, MatrixInfo, ObsColumn
from scale.data.parquet_rows import ParquetRows
from scale.data.scdl import OBS, VAR, FeatureBlock, ScdlArchive
from scale.types import SourceError, did_you_mean

_LOCATION = "X"
_GENE_COLUMNS = (
    *("symbol", "gene_symbol", "gene_symbols", "gene_name", "gene_names", "feature_name"),
    *("var_feature_id", "feature_id", "ensembl_id", "ensembl_ids", "gene_id", "gene_ids"),
)
"""Where the name of a gene is looked for: bionemo-scdl drops the row names of a table that has
columns, and makes ``var_feature_id`` of them where it has none."""
_ENSEMBL_COLUMNS = ("ensembl_id", "ensembl_ids", "gene_ids", "gene_id", "feature_id")
_BARCODE_COLUMNS = ("barcode", "obs_feature_id", "source_cell")


class ScdlFile:
    """An open archive; made by :meth:`ScdlSource.open`."""

    def __init__(self, archive: ScdlArchive) -> None:
        self.name = str(archive.path)
        self.num_cells = archive.num_rows
        self._archive = archive
        if not archive.var:
            raise SourceError(
                f"{self.name} has no tables in {VAR}; expected the names of its genes"
            )
        self._targets = [self._target_of(block) for block in archive.var]

    # --- tables of cells ------------------------------------------------------------------------

    @property
    def columns(self) -> list[str]:
        """Columns that describe cells in all blocks of the archive."""
        names = [pq.read_schema(block.path).names for block in self._archive.obs]
        return [name for name in (names[0] if names else []) if all(name in n for n in names)]

    def column(self, name: str, setting: str) -> ObsColumn:
        """Return a column as texts; ``setting`` is the key that an error message names."""
        self._check_column(name, setting)
        codes: list[npt.NDArray[np.int32]] = []
        texts: list[str] = []
        for block in self._archive.obs:
            code_N, found = _as_codes(block.path, name)
            codes.append(np.where(code_N < 0, np.int32(-1), code_N + np.int32(len(texts))))
            texts += found
        return merge_equal(np.concatenate(codes), texts)

    def _check_column(self, name: str, setting: str) -> None:
        blocks, columns = self._archive.obs, self.columns
        if name in columns:
            return
        lacking = [b.path.name for b in blocks if name not in pq.read_schema(b.path).names]
        if len(lacking) < len(blocks):
            raise SourceError(
                f"column {name!r} is missing in {len(lacking)} of the {len(blocks)} tables in "
                f"{OBS} of {self.name} ({', '.join(lacking[:5])}); give it to all of them, or set "
                f"{setting} to one that all have: {', '.join(columns)}"
            )
        raise SourceError(
            f"no column {name!r} in {OBS} of {self.name} ({did_you_mean(name, columns)}); "
            f"it has: {', '.join(columns) or 'none'}. Set {setting}"
        )

    def numbers(
        self, name: str, setting: str, kept_N: npt.NDArray[np.bool_] | None = None
    ) -> npt.NDArray[np.float64]:
        """Return a column as numbers; NaN where the value is missing or an empty text."""
        column = self.column(name, setting)
        return numbers_of(column, f"{self.name}: column {name!r} ({setting})", kept_N)

    def barcodes(self, start: int, stop: int) -> npt.NDArray[np.str_]:
        """Return the names of the cells from row ``start`` to ``stop``.

        They are those of the first of the usual columns, else ``<archive>:<row>``.
        """
        if self._barcode_rows is None:
            name = self._archive.path.name
            return np.array([f"{name}:{row}" for row in range(start, stop)], np.str_)
        values = self._barcode_rows.read(start, stop).column(0).to_pylist()
        return np.array([text_of(value) for value in values], np.str_)

    @cached_property
    def _barcode_rows(self) -> ParquetRows | None:
        found = [name for name in _BARCODE_COLUMNS if name in self.columns]
        return ParquetRows([b.path for b in self._archive.obs], found[:1]) if found else None

    # --- genes ----------------------------------------------------------------------------------

    def genes(self, location: str) -> list[str]:
        """Return the genes of the first block, which number the columns of :meth:`rows`."""
        self.matrix(location)
        return self._genes

    def ensembl_ids(self, location: str) -> list[str] | None:
        """Return Ensembl identifiers, if the first block has them under a usual name."""
        self.matrix(location)
        path = self._archive.var[0].path
        for name in _ENSEMBL_COLUMNS:
            if name in pq.read_schema(path).names:
                values = _texts(path, name)
                if all(value.startswith("ENS") for value in values):
                    return values
        return None

    @cached_property
    def _genes(self) -> list[str]:
        return self._genes_of(self._archive.var[0])

    def _genes_of(self, block: FeatureBlock) -> list[str]:
        names = pq.read_schema(block.path).names
        usual = [name for name in _GENE_COLUMNS if name in names]
        if not usual and len(names) != 1:
            raise SourceError(
                f"{block.path} has the columns {', '.join(names) or '(none)'}; expected the names "
                f"of the genes in one of {', '.join(_GENE_COLUMNS)}, or a single column"
            )
        return _texts(block.path, usual[0] if usual else names[0])

    def _target_of(self, block: FeatureBlock) -> npt.NDArray[np.int32]:
        """Return for each column of a block where its gene stands in the first block."""
        names = self._genes_of(block)
        position = {name: i for i, name in enumerate(self._genes)}
        if len(names) != len(self._genes) or set(names) != set(position):
            raise SourceError(
                f"{block.path} has other genes than {self._archive.var[0].path}: {len(names):,} "
                f"against {len(self._genes):,}, {len(set(names) & set(position)):,} in common; "
                "cut both to the same genes before they are joined"
            )
        return np.array([position[name] for name in names], np.int32)

    # --- matrix ---------------------------------------------------------------------------------

    def locations(self) -> list[str]:
        """Return the one matrix of an archive."""
        return [_LOCATION]

    def matrix(self, location: str) -> MatrixInfo:
        """Return kind and size of the matrix."""
        if location != _LOCATION:
            raise SourceError(
                f"{self.name} has no matrix at {location!r}; an archive has {_LOCATION} alone. "
                f"Set counts=auto (of {LOCATIONS})"
            )
        archive = self._archive
        shape = (archive.num_rows, len(self._genes))
        return MatrixInfo(location, "csr", shape, archive.dtypes["DATA"], archive.num_values)

    def rows(self, location: str, start: int, stop: int) -> sp.csr_matrix:
        """Return rows ``start`` to ``stop`` as CSR, with the values as they are stored."""
        self.matrix(location)
        parts = [
            self._block_rows(block, target_G, max(start, block.start), min(stop, block.stop))
            for block, target_G in zip(self._archive.var, self._targets, strict=True)
            if block.start < stop and block.stop > start
        ]
        return parts[0] if len(parts) == 1 else sp.vstack(parts, format="csr")

    def _block_rows(
        self, block: FeatureBlock, target_G: npt.NDArray[np.int32], start: int, stop: int
    ) -> sp.csr_matrix:
        rows = self._archive.rows(start, stop)
        column_M = rows.columns_M
        if column_M.size and not 0 <= column_M.min() <= column_M.max() < len(target_G):
            raise SourceError(
                f"{self._archive.path}: col_ptr.npy goes from {column_M.min()} to "
                f"{column_M.max()} in the rows from {start} to {stop - 1}; expected 0 to "
                f"{len(target_G) - 1}, the genes of {block.path}. The file is damaged"
            )
        values_M = rows.values_M
        if values_M.dtype == np.float16:
            values_M = values_M.astype(np.float32)  # scipy has no float16
        return sp.csr_matrix(
            (values_M, target_G[column_M], rows.indptr_P), shape=(stop - start, len(target_G))
        )


class ScdlSource:
    """An archive to read; opened only while it is read."""

    def __init__(self, path: Path) -> None:
        self.path: Path | None = path
        self.name = str(path)
        self._directory = path

    @contextmanager
    def open(self) -> Iterator[ScdlFile]:
        """Open the source for reading.

        Raises
        ------
        SourceError
            If there is no archive, or it is damaged.
        """
        yield ScdlFile(ScdlArchive.open(self._directory))


# --- columns of parquet files ---------------------------------------------------------------------


def _read_column(path: Path, name: str) -> pa.ChunkedArray:
    """Return a column; texts as a dictionary, which is what parquet stores of labels."""
    try:
        return pq.read_table(path, columns=[name], read_dictionary=[name]).column(0)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{path}: column {name!r} cannot be read ({error})") from error


def _texts(path: Path, name: str) -> list[str]:
    return [text_of(value) for value in _read_column(path, name).to_pylist()]


def _as_codes(path: Path, name: str) -> tuple[npt.NDArray[np.int32], list[str]]:
    """Return a column as codes, -1 = missing, and the texts they stand for."""
    values = _read_column(path, name)
    try:
        coded = values if pa.types.is_dictionary(values.type) else values.dictionary_encode()
    except pa.ArrowException as error:
        raise SourceError(f"{path}: column {name!r} holds {values.type}; expected texts") from error
    coded = coded.unify_dictionaries().combine_chunks()
    distinct = coded.dictionary.to_pylist()
    code_N = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32)
    missing = [i for i, value in enumerate(distinct) if value is None or value != value]
    code_N[np.isin(code_N, missing)] = -1
    return code_N, [text_of(value) for value in distinct]
