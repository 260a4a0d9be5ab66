"""The figures of a report: which are drawn, what stands under them, and what they say unseen.

Each builder takes a :class:`Subject` and returns pictures, none where its data is absent. Every
picture carries an alternative text with its main numbers, so that the report can be listened to.
"""

from __future__ import annotations

from collections.abc import Callable

from scale.evaluate.pictures.of_calibration import (
    draw_calibration,
    draw_effect_sizes,
    draw_ranks,
)
from scale.evaluate.pictures.of_cells import draw_cells, draw_summary
from scale.evaluate.pictures.of_comparisons import (
    draw_collapse,
    draw_gains,
    draw_lists,
    draw_scaled,
)
from scale.evaluate.pictures.of_genes import draw_deltas, draw_effects, draw_fold_changes
from scale.evaluate.pictures.of_scores import (
    draw_contexts,
    draw_overlap,
    draw_scores,
    draw_strips,
    draw_training,
)
from scale.evaluate.pictures.subject import Picture, Subject
from scale.plot.canvas import CAN_DRAW

__all__ = ["Picture", "Subject", "draw", "draw_summary"]

BUILDERS: tuple[Callable[[Subject], list[Picture]], ...] = (
    draw_scores,
    draw_scaled,
    draw_gains,
    draw_collapse,
    draw_deltas,
    draw_effects,
    draw_fold_changes,
    draw_lists,
    draw_overlap,
    draw_strips,
    draw_contexts,
    draw_effect_sizes,
    draw_ranks,
    draw_calibration,
    draw_cells,
    draw_training,
)


def draw(subject: Subject) -> list[Picture]:
    """Return every figure that the evaluation has data for, in the order of the report.

    None without matplotlib: a report then has its tables.
    """
    if not CAN_DRAW:
        return []
    return [picture for builder in BUILDERS for picture in builder(subject)]
