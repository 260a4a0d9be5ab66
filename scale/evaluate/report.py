"""The report: what an evaluation found, as files, as text for a terminal, and as one page.

The page says in words first whether a model beats the best baseline, then gives the table, then
pictures, then what was left out and how it was made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scale.config import ProtocolConfig
from scale.evaluate import page, tables, text
from scale.evaluate.compare import differences
from scale.evaluate.findings import Findings
from scale.evaluate.pictures import Subject, draw, draw_summary
from scale.evaluate.provenance import of_predictions, provenance
from scale.plot.canvas import png
from scale.runtime import atomic_path, write_json

if TYPE_CHECKING:
    from anndata import AnnData

    from scale.evaluate.protocol import Evaluation

FILES = (
    "scores.parquet",
    "scores.csv",
    "aggregate.csv",
    "differences.csv",
    "ceiling.csv",
    "excluded.csv",
    "collapse.json",
    "meta.json",
    "summary.json",
    "summary.png",
    "report.md",
    "report.html",
)
"""What :meth:`Report.save` writes; the page last, so that it stands for the whole.

``summary.png`` is left out where there is nothing to draw. Beside them stand the folder
``cell_eval`` with wide tables of each context, and, in the profile ``paper_pooled``,
``pooled_over_contexts_scores.csv`` and ``..._aggregate.csv``.
"""
POOLED_FILES = "pooled_over_contexts"
"""Beginning of the names of all files with pooled numbers."""


class Report:
    """What an evaluation found, ready to be read or saved.

    Parameters
    ----------
    evaluation
        Scores of models, baselines and the ceiling.
    title
        First line of the page.
    training_metrics
        ``metrics.jsonl`` of a training run as a table, for its loss curves.
    meta
        What else explains the report; added to that of the evaluation.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        *,
        title: str = "How well are unseen responses predicted?",
        training_metrics: pd.DataFrame | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        self.evaluation = evaluation
        self.title = title
        self.training_metrics = training_metrics
        self.findings = Findings(evaluation)
        self.meta = provenance(evaluation.meta, meta or {})

    @property
    def scores(self) -> pd.DataFrame:
        """One row per (method, form, condition, metric)."""
        return self.evaluation.scores

    @property
    def aggregate(self) -> pd.DataFrame:
        """One row per (method, form, metric), with intervals."""
        return self.evaluation.aggregate

    @cached_property
    def subject(self) -> Subject:
        """What the figures are drawn from."""
        return Subject(
            self.evaluation, self.findings.models, self.findings.baselines, self.training_metrics
        )

    def table(self) -> str:
        """Return the main table as Markdown: methods x headline metrics."""
        return text.main_table(self.findings)

    def summary(self) -> dict[str, dict[str, float]]:
        """Return method -> metric -> mean over contexts.

        Where a method has two forms (dispersed cells, the exact mean) it is the better one: that
        is what a claim has to beat.
        """
        return self.findings.summary()

    def subtitle(self) -> str:
        """Return how much was judged, in one line."""
        shown = self.scores[self.scores["method"] == self.findings.models[0]]
        contexts = shown["context"].nunique()
        conditions = len(shown[["context", "perturbation"]].drop_duplicates())
        words = [
            ", ".join(self.findings.models),
            f"{conditions:,} condition{'s' if conditions != 1 else ''} in "
            f"{contexts:,} context{'s' if contexts != 1 else ''}",
        ]
        if profile := self.meta.get("profile"):
            words.append(f"protocol {profile}")
        if self.findings.pooled_evaluation is not None:
            words.append("each context alone, and pooled over contexts")
        return " · ".join(words)

    def html(self) -> str:
        """Return the page."""
        return page.build(
            self.findings,
            self.subject,
            draw(self.subject),
            title=self.title,
            subtitle=self.subtitle(),
            meta=self.meta,
        )

    def markdown(self) -> str:
        """Return the report as text for a terminal."""
        return text.markdown(
            self.findings, title=self.title, subtitle=self.subtitle(), meta=self.meta
        )

    def save(self, folder: Path | str, *, overwrite: bool = False) -> Path:
        """Write every file of the report into ``folder`` and return the path of the page.

        Raises
        ------
        FileExistsError
            If there is a report already and ``overwrite`` is False.
        """
        folder = Path(folder)
        if (folder / "report.html").exists() and not overwrite:
            raise FileExistsError(f"{folder / 'report.html'} exists; set overwrite, or use another")
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / "scores.parquet") as temporary:
            self.scores.to_parquet(temporary, index=False, compression="zstd")
        for name, table in self._csv_tables():
            path = folder / f"{name}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                table.to_csv(temporary, index=False)
        write_json(folder / "collapse.json", _for_json(self.evaluation.collapse))
        write_json(folder / "meta.json", _for_json({"title": self.title, **self.meta}))
        write_json(folder / "summary.json", _for_json(self.summary()))
        if (figure := draw_summary(self.subject)) is not None:
            with atomic_path(folder / "summary.png") as temporary:
                temporary.write_bytes(png(figure))
        for name, content in (("report.md", self.markdown()), ("report.html", self.html())):
            with atomic_path(folder / name) as temporary:
                temporary.write_text(content, encoding="utf-8")
        return folder / "report.html"

    def _csv_tables(self) -> Iterator[tuple[str, pd.DataFrame]]:
        """Yield (name without the ending, table) of every CSV file."""
        yield "scores", self.scores
        yield "aggregate", self.aggregate
        yield "differences", differences(self.evaluation)
        yield "ceiling", tables.ceiling(self.aggregate)
        yield "excluded", self.evaluation.excluded
        for path, table in tables.cell_eval_tables(self.scores, self.findings.models):
            yield str(Path("cell_eval") / path.with_suffix("")), table
        for context, table in self.evaluation.gene_tables.items():
            yield str(Path("cell_eval") / f"{tables.file_name(context)}_real_de"), table
        if (pooled := self.findings.pooled_evaluation) is not None:
            yield f"{POOLED_FILES}_scores", pooled.scores
            yield f"{POOLED_FILES}_aggregate", pooled.aggregate

    def _repr_markdown_(self) -> str:
        return f"**{self.title}**\n\n{self.subtitle()}\n\n{self.table()}"

    def __repr__(self) -> str:
        return f"Report: {self.subtitle()}\n{self.table()}"


def _for_json(value: Any) -> Any:
    """Return ``value`` with what JSON cannot hold replaced: NaN by null, arrays by lists."""
    if isinstance(value, Mapping):
        return {str(k): _for_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [_for_json(v) for v in value]
    if isinstance(value, np.ndarray):
        return _for_json(value.tolist())
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def evaluate(
    predicted: AnnData | Path | str | Mapping[str, AnnData | Path | str],
    observed: AnnData | Path | str,
    *,
    perturbation_key: str,
    control: str,
    cell_type_key: str,
    unit_key: str | None = None,
    batch_key: str | None = None,
    train: AnnData | Path | str | None = None,
    protocol: ProtocolConfig | None = None,
    seed: int = 0,
) -> Report:
    """Return how well predicted cells match observed ones, beside baselines and a ceiling.

    Parameters
    ----------
    predicted
        Predicted cells (log1p values) as AnnData or the path of an h5ad, or method -> either.
    observed
        Observed cells of the same conditions, with control cells.
    perturbation_key, cell_type_key
        Columns of ``.obs``: what was done to a cell, and its context.
    control
        Label of the control in the column ``perturbation_key``.
    unit_key
        Column of the independent unit (cell line, donor) over which intervals are taken; None =
        the cell type.
    batch_key
        Column of the batch (plate) whose own control cells a condition is compared with; None =
        those of all batches.
    train
        Training cells with the controls of all contexts, for the baselines; without them no claim
        is possible.
    protocol
        Rules; None = the strict ones.
    seed
        Of subsamples and halvings.
    """
    from scale.evaluate.protocol import run_protocol

    methods = predicted if isinstance(predicted, Mapping) else {"model": predicted}
    evaluation = run_protocol(
        methods,
        observed,
        perturbation_key=perturbation_key,
        cell_type_key=cell_type_key,
        control=control,
        unit_key=unit_key,
        batch_key=batch_key,
        train=train,
        protocol=protocol or ProtocolConfig(),
        seed=seed,
    )
    made = {"unit": unit_key or cell_type_key, "command": "scale.evaluate, from Python"}
    return Report(evaluation, meta={**of_predictions(methods), **made})
