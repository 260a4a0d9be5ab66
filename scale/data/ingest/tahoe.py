"""Tahoe-100M as a source of cells: rows of tokens in parquet, joined with tables of metadata.

A row lists the tokens of the genes that a cell expresses and their counts, led by a marker that is
no gene. What was done to the cell is not in the row but in the table of samples, so every row is
looked up there. Columns of names are read as codes; no cell becomes a Python object.

Shapes: N = cells of a file.
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
from scale.data.ingest.source import MatrixInfo, ObsColumn
from scale.data.ingest.tahoe_rows import TOKENS, VALUES, TokenRows
from scale.data.ingest.tahoe_tables import CELL_NAME, TahoeTables, read_tables
from scale.data.parquet_rows import ParquetRows
from scale.data.tahoe import ROW_SCHEMA
from scale.types import SourceError, did_you_mean

_SAMPLE, _BARCODE, _CELL_LINE = "sample", "BARCODE_SUB_LIB_ID", "cell_line_id"
_MUST_AGREE = ("drug", "plate")
"""Columns that rows and sample table share: where they differ, the tables are those of others."""
_BUFFER_BYTES = 1 << 20
"""Of a column's compressed bytes, read at once; pyarrow would hold those of a whole row group."""


class TahoeFile:
    """An open file of rows; made by :meth:`TahoeSource.open`."""

    def __init__(self, path: Path, parquet: pq.ParquetFile, tables: TahoeTables) -> None:
        self.name = str(path)
        self.num_cells = parquet.metadata.num_rows
        self._path = path
        self._parquet = parquet
        self._tables = tables
        self._check_schema()
        self._rows = TokenRows(parquet, self.name, tables)
        if self.num_cells == 0:
            raise SourceError(f"{self.name} has no cells; expected at least one row")

    def _check_schema(self) -> None:
        schema = self._parquet.schema_arrow
        needed = (TOKENS, VALUES, _SAMPLE, *_MUST_AGREE, _BARCODE, _CELL_LINE)
        missing = [name for name in needed if name not in schema.names]
        if missing:
            raise SourceError(
                f"{self.name} has no column {', '.join(map(repr, missing))}; it has "
                f"{', '.join(schema.names)}; expected rows of Tahoe-100M: "
                f"{', '.join(ROW_SCHEMA.names)}"
            )
        for name, is_right in ((TOKENS, pa.types.is_integer), (VALUES, _is_number)):
            kind = schema.field(name).type
            is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
            if not is_list or not is_right(kind.value_type):
                expected = ROW_SCHEMA.field(name).type
                raise SourceError(f"{self.name}: column {name!r} is {kind}; expected {expected}")

    # --- what describes the cells ---------------------------------------------------------------

    @property
    def columns(self) -> list[str]:
        """Columns of the rows, then those joined by sample and by cell line."""
        joined = [*self._tables.sample_columns, CELL_NAME]
        return [*self._row_columns, *(name for name in joined if name not in self._row_columns)]

    @cached_property
    def _row_columns(self) -> list[str]:
        return [name for name in self._parquet.schema_arrow.names if name not in (TOKENS, VALUES)]

    def column(self, name: str, setting: str) -> ObsColumn:
        """Return a column as texts; ``setting`` is the key that an error message names."""
        if name in self._row_columns:
            return self._row_column(name)
        if name in self._tables.sample_columns:
            return self._sample_column(name)
        if name == CELL_NAME:
            return self._cell_names()
        raise SourceError(
            f"no column {name!r} in {self.name} or the tables in {self._tables.folder} "
            f"({did_you_mean(name, self.columns)}); they have: {', '.join(self.columns)}. "
            f"Set {setting}"
        )

    def numbers(
        self, name: str, setting: str, kept_N: npt.NDArray[np.bool_] | None = None
    ) -> npt.NDArray[np.float64]:
        """Return a column as numbers; NaN where the value is missing or an empty text."""
        where = f"{self.name}: column {name!r} ({setting})"
        return numbers_of(self.column(name, setting), where, kept_N)

    def barcodes(self, start: int, stop: int) -> npt.NDArray[np.str_]:
        """Return the barcodes from row ``start`` to ``stop``."""
        with self._reading(f"the barcodes of rows {start} to {stop - 1}"):
            values = self._barcode_rows.read(start, stop).column(0).fill_null("")
        return np.array(values.to_numpy(), dtype=np.str_)

    @cached_property
    def _barcode_rows(self) -> ParquetRows:
        return ParquetRows([self._path], [_BARCODE])

    def _row_column(self, name: str) -> ObsColumn:
        with self._reading(f"column {name!r}"):
            values = self._parquet.read([name], use_threads=False).column(0)
            if not pa.types.is_dictionary(values.type):
                values = values.dictionary_encode()
            coded = values.unify_dictionaries().combine_chunks()
        code_N = coded.indices.fill_null(-1).to_numpy().astype(np.int32)
        return merge_equal(code_N, [text_of(value) for value in coded.dictionary.to_pylist()])

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            raise SourceError(
                f"{self.name}: {what} cannot be read ({error}); the file is damaged, fetch it again"
            ) from error

    # --- joins ----------------------------------------------------------------------------------

    def _sample_column(self, name: str) -> ObsColumn:
        """Return a column of the sample table for every row."""
        samples, number = self._row_column(_SAMPLE), self._tables.sample_number
        self._check_known(samples, list(number), _SAMPLE, "sample_metadata")
        rows = [number[text.strip()] for text in samples.names]
        for shared in _MUST_AGREE:
            if shared in self._tables.sample_columns:
                self._check_agreement(samples, rows, shared)
        return _mapped(samples, [self._tables.sample_columns[name][row] for row in rows])

    def _cell_names(self) -> ObsColumn:
        """Return the everyday name of every row's cell line."""
        lines, known = self._row_column(_CELL_LINE), self._tables.cell_names()
        self._check_known(lines, list(known), _CELL_LINE, "cell_line_metadata")
        return _mapped(lines, [known[text.strip()] for text in lines.names])

    def _check_known(self, column: ObsColumn, known: list[str], what: str, table: str) -> None:
        """Refuse rows with a name that a table does not have."""
        strange = [text for text in column.names if text.strip() not in set(known)]
        if strange:
            raise SourceError(
                f"{self.name}: {len(strange)} {what} are not in {self._tables.folder}/"
                f"{table}.parquet, as {strange[0]!r} ({did_you_mean(strange[0].strip(), known)}); "
                "expected the tables that belong to these rows. Set source.metadata"
            )

    def _check_agreement(self, samples: ObsColumn, rows: list[int], name: str) -> None:
        """Refuse rows of which the sample table says something else."""
        found, values = self._row_column(name), self._tables.sample_columns[name]
        pair_N = samples.codes_N.astype(np.int64) * len(found.names) + found.codes_N
        is_known_N = (samples.codes_N >= 0) & (found.codes_N >= 0)
        for pair in np.unique(pair_N[is_known_N]).tolist():
            sample, code = divmod(pair, len(found.names))
            expected = values[rows[sample]]
            if expected is not None and found.names[code].strip() != expected:
                row = int(np.flatnonzero(is_known_N & (pair_N == pair))[0])
                raise SourceError(
                    f"{self.name}: row {row} of sample {samples.names[sample]!r} has {name} "
                    f"{found.names[code]!r}, but {self._tables.folder}/sample_metadata.parquet has "
                    f"{expected!r}; expected the tables that belong to these rows. "
                    "Set source.metadata"
                )

    # --- counts ---------------------------------------------------------------------------------

    def genes(self, location: str) -> list[str]:
        """Return the gene symbols in the order of their tokens."""
        self.matrix(location)
        return list(self._tables.symbols)

    def ensembl_ids(self, location: str) -> list[str] | None:
        """Return Ensembl identifiers, if the table of genes has them."""
        self.matrix(location)
        return None if self._tables.ensembl_ids is None else list(self._tables.ensembl_ids)

    def locations(self) -> list[str]:
        """Return the one matrix of the rows."""
        return [VALUES]

    def matrix(self, location: str) -> MatrixInfo:
        """Return the size of the counts; the stored values include the markers."""
        if location != VALUES:
            raise SourceError(
                f"{self.name} has no matrix at {location!r}; rows of Tahoe-100M have {VALUES} "
                "alone. Set counts=auto"
            )
        shape = (self.num_cells, len(self._tables.symbols))
        num_stored = self._rows.num_values
        return MatrixInfo(location, "csr", shape, self._rows.dtype, num_stored, is_counts=True)

    def rows(self, location: str, start: int, stop: int) -> sp.csr_matrix:
        """Return rows ``start`` to ``stop`` as CSR, without markers and with ascending columns."""
        self.matrix(location)
        return self._rows.read(start, stop)


class TahoeSource:
    """A file of rows to read; opened only while it is read.

    Parameters
    ----------
    path
        A parquet file of the dataset.
    metadata
        Folder with the tables that its rows refer to.
    """

    def __init__(self, path: Path, metadata: Path) -> None:
        self.path: Path | None = path
        self.name = str(path)
        self._file = path
        self._metadata = metadata

    @contextmanager
    def open(self) -> Iterator[TahoeFile]:
        """Open the source for reading.

        Raises
        ------
        SourceError
            If the file is no whole parquet file, its columns are not those of Tahoe-100M, or a
            table is missing.
        """
        tables = read_tables(self._metadata)
        try:
            schema = pq.read_schema(self._file)
            parquet = pq.ParquetFile(
                self._file,
                read_dictionary=[f.name for f in schema if _is_text(f.type)],
                buffer_size=_BUFFER_BYTES,
                pre_buffer=False,
                page_checksum_verification=True,
            )
        except (pa.ArrowException, OSError) as error:
            raise SourceError(
                f"{self.name} cannot be opened as parquet ({error}); expected a whole file"
            ) from error
        with parquet:
            yield TahoeFile(self._file, parquet, tables)


def _mapped(column: ObsColumn, values: list[str | None]) -> ObsColumn:
    """Return a column with other names; None is missing."""
    missing = [code for code, value in enumerate(values) if value is None]
    code_N = np.where(np.isin(column.codes_N, missing), np.int32(-1), column.codes_N)
    return merge_equal(code_N, [value or "" for value in values])


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))
