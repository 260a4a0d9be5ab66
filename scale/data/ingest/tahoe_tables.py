"""The metadata tables of Tahoe-100M: what its rows refer to by token, sample and cell line.

They are files beside the rows and are never downloaded. Names are stripped on both sides of every
join: two drugs are written with a trailing blank in some tables and without it in others.

Shapes: G = genes, T = gene tokens up to the largest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from scale.data.ingest.labels import text_of
from scale.data.tahoe import FIRST_TOKEN
from scale.types import SourceError

LABEL = "drugname_drugconc"
"""Column of the sample table with drug and dose."""
CELL_NAME = "cell_name"
"""Column of the cell line table with the everyday name."""
_CELL_LINE_ID = "Cell_ID_Cellosaur"
_MAX_TOKEN = 1 << 24
WHERE_TABLES_ARE = (
    "source.metadata is a folder with gene_metadata.parquet and sample_metadata.parquet (and "
    f"cell_line_metadata.parquet for the column {CELL_NAME}); copy them from the folder metadata/ "
    "of the dataset tahoebio/Tahoe-100M on Hugging Face"
)


@dataclass(frozen=True, slots=True)
class TahoeTables:
    """What the metadata folder says.

    Parameters
    ----------
    folder
        Where the tables are.
    symbols, ensembl_ids
        Genes in the order of their tokens.
    column_T
        Position of the gene of a token; -1 where no gene has the token.
    sample_number
        Row of the sample table of each stripped sample name.
    sample_columns
        The other columns of the sample table as texts, None where missing; names are stripped.
    """

    folder: Path
    symbols: tuple[str, ...]
    ensembl_ids: tuple[str, ...] | None
    column_T: npt.NDArray[np.int32]
    sample_number: Mapping[str, int]
    sample_columns: Mapping[str, tuple[str | None, ...]]

    @classmethod
    def read(cls, folder: Path) -> TahoeTables:
        """Read the tables of genes and of samples.

        Raises
        ------
        SourceError
            If a table or column is missing, or a token or sample has two rows.
        """
        genes = _read(folder, "gene_metadata", ["gene_symbol", "token_id"])
        genes = genes.sort_values("token_id", kind="stable")
        samples = _read(folder, "sample_metadata", ["sample", LABEL])
        names = [name.strip() for name in samples["sample"].astype(str)]
        sample_number = {name: i for i, name in enumerate(names)}
        if len(sample_number) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise SourceError(
                f"{folder}/sample_metadata.parquet has sample {twice!r} more than once; expected "
                "one row per sample"
            )
        has_ids = "ensembl_id" in genes and genes["ensembl_id"].notna().all()
        return cls(
            folder,
            tuple(genes["gene_symbol"].astype(str)),
            tuple(genes["ensembl_id"].astype(str)) if has_ids else None,
            _column_of_token(folder, genes["token_id"]),
            sample_number,
            {str(n): _stripped(samples[n]) for n in samples.columns if n != "sample"},
        )

    def cell_names(self) -> dict[str, str]:
        """Return the everyday name of each cell line identifier.

        Raises
        ------
        SourceError
            If a name stands for two cell lines, or a cell line has two names: as a context, the
            name would mix or tear apart what the identifier keeps.
        """
        table = _read(self.folder, "cell_line_metadata", [CELL_NAME, _CELL_LINE_ID])
        pairs = pd.DataFrame(
            {name: table[name].astype(str).str.strip() for name in (CELL_NAME, _CELL_LINE_ID)}
        ).drop_duplicates()
        for name, other in ((CELL_NAME, _CELL_LINE_ID), (_CELL_LINE_ID, CELL_NAME)):
            double = pairs[pairs[name].duplicated(keep=False)].sort_values([name, other])
            if len(double):
                raise SourceError(
                    f"{self.folder}/cell_line_metadata.parquet: {name} {double[name].iloc[0]!r} "
                    f"has {len(double[double[name] == double[name].iloc[0]])} {other}: "
                    f"{', '.join(double[other].iloc[:5])}; set columns.cell_type=cell_line_id"
                )
        return dict(zip(pairs[_CELL_LINE_ID], pairs[CELL_NAME], strict=True))


def read_tables(folder: Path) -> TahoeTables:
    """Return the tables of a folder, read once per process however many files refer to them."""
    paths = [folder / f"{name}.parquet" for name in ("gene_metadata", "sample_metadata")]
    return _tables_at(folder, tuple(p.stat().st_mtime_ns if p.exists() else 0 for p in paths))


@lru_cache(maxsize=1)
def _tables_at(folder: Path, changed: tuple[int, ...]) -> TahoeTables:
    return TahoeTables.read(folder)


def _read(folder: Path, name: str, needed: Sequence[str]) -> pd.DataFrame:
    path = folder / f"{name}.parquet"
    if not path.is_file():
        found = "no such folder" if not folder.is_dir() else f"no {path.name} in {folder}"
        raise SourceError(f"source.metadata={folder}: {found}; {WHERE_TABLES_ARE}")
    try:
        table: pd.DataFrame = pq.read_table(path).to_pandas()
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{path} cannot be read ({error}); {WHERE_TABLES_ARE}") from error
    for column in needed:
        if column not in table:
            raise SourceError(
                f"{path} has no column {column!r}; it has {', '.join(map(str, table.columns))}. "
                f"{WHERE_TABLES_ARE}"
            )
        if table[column].isna().any():
            raise SourceError(
                f"{path}: column {column!r} is missing in row "
                f"{int(np.flatnonzero(table[column].isna())[0])}; expected a value in every row"
            )
    return table


def _column_of_token(folder: Path, token_G: pd.Series[int]) -> npt.NDArray[np.int32]:
    """Return the position of each token's gene; tokens may have gaps."""
    place = f"{folder}/gene_metadata.parquet: column 'token_id'"
    if token_G.dtype.kind not in "iu" or not len(token_G):
        raise SourceError(f"{place} holds {token_G.dtype}; expected whole numbers")
    tokens = token_G.to_numpy(np.int64)
    if tokens[0] < FIRST_TOKEN:
        raise SourceError(
            f"{place} has {tokens[0]}; gene tokens start at {FIRST_TOKEN}, smaller ones are markers"
        )
    if (twice := np.flatnonzero(np.diff(tokens) == 0)).size:
        raise SourceError(f"{place} has {tokens[twice[0]]} more than once; expected one gene each")
    if tokens[-1] > _MAX_TOKEN:
        raise SourceError(f"{place} has {tokens[-1]:,}; expected numbers up to {_MAX_TOKEN:,}")
    column_T = np.full(int(tokens[-1]) + 1, -1, dtype=np.int32)
    column_T[tokens] = np.arange(len(tokens), dtype=np.int32)
    return column_T


def _stripped(values: pd.Series) -> tuple[str | None, ...]:
    return tuple(
        None if missing else text_of(value).strip()
        for value, missing in zip(values, values.isna(), strict=True)
    )
