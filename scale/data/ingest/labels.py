"""Values of a column as texts and as numbers, by one rule for every format.

Shapes: N = cells of a file.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from scale.data.ingest.source import ObsColumn
from scale.types import SourceError

MISSING_TEXTS = ("", "nan", "none", "na", "<na>")
"""What stands for a missing number, in lower case."""


def text_of(value: object) -> str:
    """Return the text of a value: whole numbers without a point, bytes decoded.

    Examples
    --------
    >>> text_of(3.0), text_of(b"A549"), text_of(True)
    ('3', 'A549', 'True')
    """
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value)


def merge_equal(codes_N: npt.NDArray[np.int32], texts: Sequence[str]) -> ObsColumn:
    """Return a column whose names are distinct; codes below 0 are missing.

    Different values may have one text, as 1 and "1" among categories of mixed type.
    """
    names = tuple(dict.fromkeys(texts))
    if len(names) < len(texts):
        position = {text: i for i, text in enumerate(names)}
        target = np.array([position[text] for text in texts], dtype=np.int32)
        codes_N = np.where(codes_N < 0, np.int32(-1), target[codes_N])
    return ObsColumn(codes_N, names)


def numbers_of(
    column: ObsColumn, where: str, kept_N: npt.NDArray[np.bool_] | None = None
) -> npt.NDArray[np.float64]:
    """Return a column as numbers; NaN where the value is missing or an empty text.

    Parameters
    ----------
    column
        Texts.
    where
        File, column and setting, for messages.
    kept_N
        Cells whose texts must be numbers; None = all.

    Raises
    ------
    SourceError
        For the first text that is no number.
    """
    used = np.unique(column.codes_N if kept_N is None else column.codes_N[kept_N])
    values = np.full(len(column.names) + 1, np.nan)
    for code in used[used >= 0].tolist():
        text = column.names[code].strip()
        if text.lower() in MISSING_TEXTS:
            continue
        try:
            values[code] = float(text)
        except ValueError as error:
            raise SourceError(f"{where} holds {text!r}; expected numbers") from error
    return values[column.codes_N]
