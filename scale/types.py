"""What the parts hand to each other.

Everything that crosses a border between two rooms of the package stands here: the names of a
perturbation, the vocabulary that a model was trained with, a batch of cell sets, and the four
errors a caller can act on. The module imports nothing of the package and no heavy library, so
that a misspelt setting can be reported before torch is loaded.

Shapes: B = sets in the batch, S = cells per set, U = cells of the summary draw, G = genes,
J = components of a perturbation.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

UNKNOWN_COMPONENT = 0
"""Row of the component table for a perturbation that was never seen; the null of guidance."""
CONTROL_COMPONENT = 1
"""Row of the component table for the control."""
ABSENT = -1
"""Filler of integer fields: no component, no batch, an unknown cell type."""


class SourceError(ValueError):
    """Input files or tables cannot be used as they are."""


class StoreError(ValueError):
    """A store is missing, damaged, or does not fit the run."""


class SplitError(ValueError):
    """A split names what is not there, or contradicts itself."""


class PlanError(ValueError):
    """No plan of cell sets can be made, or a saved position belongs to another plan."""


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or does not fit the run."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Return the known names most like ``name``, best first; differences of case count little.

    Examples
    --------
    >>> nearest("imatinb", ["Imatinib", "Erdafitinib", "DMSO"])
    ['Imatinib']
    """
    lowered: dict[str, str] = {}
    for candidate in known:
        lowered.setdefault(candidate.lower(), candidate)
    return [lowered[m] for m in get_close_matches(name.lower(), lowered, n=count, cutoff=0.7)]


def did_you_mean(name: str, known: Sequence[str], shown: int = 10) -> str:
    """Return the half sentence that follows an unknown name in an error message."""
    close = nearest(name, known)
    if close:
        return f"did you mean {' or '.join(repr(c) for c in close)}?"
    listed = ", ".join(sorted(known)[:shown])
    return f"known: {listed}{', ...' if len(known) > shown else ''}"


@dataclass(frozen=True, slots=True, order=True)
class Component:
    """One agent of a perturbation: a drug at a dose, a gene knocked out, a cytokine.

    Parameters
    ----------
    name
        The agent, stripped of blanks at both ends.
    dose
        Amount in ``unit``, or None where there is none.
    unit
        Unit of ``dose`` as the source has it (``"uM"``), or None.
    """

    name: str
    dose: float | None = None
    unit: str | None = None


@dataclass(frozen=True, slots=True, order=True)
class Perturbation:
    """What was done to the cells of a condition: one component, or a combination of several.

    Components are kept sorted, so that the order in which a source lists them cannot matter.
    """

    components: tuple[Component, ...]

    def __post_init__(self) -> None:
        if not self.components:
            raise ValueError("a perturbation needs at least one component")
        object.__setattr__(self, "components", tuple(sorted(self.components, key=_component_key)))

    @property
    def label(self) -> str:
        """Canonical text: ``A``, ``A+B`` without doses, ``[('A', 0.5, 'uM')]`` with them.

        Examples
        --------
        >>> Perturbation.parse("[('Erdafitinib ', 0.50, 'uM')]").label
        "[('Erdafitinib', 0.5, 'uM')]"
        >>> Perturbation.parse("KLF1+CEBPE", separator="+").label
        'CEBPE+KLF1'
        """
        if all(c.dose is None for c in self.components):
            return "+".join(c.name for c in self.components)
        return repr([(c.name, c.dose, c.unit) for c in self.components])

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the components."""
        return tuple(c.name for c in self.components)

    @property
    def doses(self) -> tuple[float, ...]:
        """Doses of the components that have one."""
        return tuple(c.dose for c in self.components if c.dose is not None)

    @property
    def without_units(self) -> Perturbation:
        """The same agents at the same doses, for comparison with what was written without units."""
        return Perturbation(tuple(replace(c, unit=None) for c in self.components))

    @classmethod
    def parse(
        cls,
        label: str,
        *,
        dose: float | None = None,
        unit: str | None = None,
        separator: str | None = None,
    ) -> Perturbation:
        """Read a perturbation from a label.

        Parameters
        ----------
        label
            A plain name, or the text of a list of ``(drug, dose, unit)`` as in Tahoe-100M.
        dose, unit
            Dose of a plain name from a column of its own.
        separator
            Text between the names of a combination, or None where names are never combined.

        Raises
        ------
        SourceError
            If the label is empty or starts like a list of tuples but is none.
        """
        text = label.strip()
        if text.startswith("[("):
            return cls(_parse_drug_dose_list(text))
        names = [text] if separator is None else [part.strip() for part in text.split(separator)]
        if not all(names):
            raise SourceError(f"empty perturbation label {label!r}; expected a name")
        if dose is not None and not math.isfinite(dose):
            dose = None
        return cls(tuple(Component(n, dose, unit if dose is not None else None) for n in names))


def _component_key(component: Component) -> tuple[str, float, str]:
    dose = -1.0 if component.dose is None else component.dose
    return component.name, dose, component.unit or ""


def _parse_drug_dose_list(text: str) -> tuple[Component, ...]:
    expected = "expected a list of (drug, dose, unit), as \"[('Erdafitinib', 0.5, 'uM')]\""
    try:
        items = ast.literal_eval(text)
    except (SyntaxError, ValueError) as error:
        raise SourceError(f"perturbation label {text!r} cannot be read; {expected}") from error
    if not isinstance(items, list) or not items:
        raise SourceError(f"perturbation label {text!r} is no list; {expected}")
    components = []
    for item in items:
        match item:
            case (str(name), int() | float() as dose, str(unit)) if name.strip():
                components.append(Component(name.strip(), float(dose), unit.strip()))
            case _:
                raise SourceError(f"perturbation label {text!r} holds {item!r}; {expected}")
    return tuple(components)


@dataclass(frozen=True, slots=True)
class Condition:
    """What distinguishes one group of cells from another: where, what, and in which batch."""

    cell_type: str
    perturbation: Perturbation
    batch: str | None = None
    is_control: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Names behind the integers of a batch, and how the numbers were made: part of a checkpoint.

    Parameters
    ----------
    genes
        Symbols in model order.
    components
        Agents by row of the component table; the first two are the unknown and the control.
    cell_types, batches
        Names by index. The model adds one: its row 0 is the unknown.
    perturbations
        Canonical labels seen in training, sorted; the control is not among them.
    control
        Label of the control in the source.
    perturbation_key, cell_type_key, batch_key, dose_key
        Columns of ``.obs`` in the source, so that predictions can be written under them.
    separator
        Text between the names of a combination in the source, or None.
    target_sum
        Counts per cell after normalisation.
    value_scale
        log1p values are divided by this number before the model sees them.
    library_key
        Column of ``.obs`` with total counts, where the source's matrix was cut to some genes.
    feature_blocks
        What the numbers of a component's features are: kind, size and making of each run of them.
    feature_sha256
        Hash of the file they came from, or None.
    described
        Agents that were never trained on and are known by their features; rows behind the table.
    """

    genes: tuple[str, ...]
    components: tuple[str, ...]
    cell_types: tuple[str, ...]
    batches: tuple[str, ...]
    perturbations: tuple[str, ...]
    control: str
    perturbation_key: str
    cell_type_key: str
    batch_key: str | None
    dose_key: str | None
    separator: str | None
    target_sum: float
    value_scale: float
    library_key: str | None = None
    feature_blocks: tuple[Mapping[str, Any], ...] = ()
    feature_sha256: str | None = None
    described: tuple[str, ...] = ()

    @property
    def num_features(self) -> int:
        """Numbers that describe a component beside its name; 0 = none."""
        return sum(int(block["size"]) for block in self.feature_blocks)

    @property
    def row_of(self) -> dict[str, int]:
        """Agent -> its row; rows from the length of ``components`` on are described agents."""
        return {name: row for row, name in enumerate((*self.components, *self.described))}

    @property
    def genes_sha256(self) -> str:
        """Hash of the gene symbols in order."""
        return sha256("\n".join(self.genes).encode()).hexdigest()

    def component_rows(self, perturbation: Perturbation) -> list[int]:
        """Return the component table's rows of a perturbation.

        Raises
        ------
        ValueError
            If a component was never seen in training and has no feature; the message names the
            nearest known ones.
        """
        rows = []
        known = self.row_of
        for component in perturbation.components:
            row = known.get(component.name, UNKNOWN_COMPONENT)
            if row == UNKNOWN_COMPONENT:
                choices = (*self.components[CONTROL_COMPONENT + 1 :], *self.described)
                raise ValueError(
                    f"perturbation {component.name!r} was not seen in training and has no "
                    f"feature; {did_you_mean(component.name, choices)}"
                )
            rows.append(row)
        return rows

    def save(self, path: Path) -> None:
        """Write the vocabulary as JSON."""
        record = {f.name: getattr(self, f.name) for f in fields(self)}
        path.write_text(json.dumps(record, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Vocabulary:
        """Read what :meth:`save` wrote."""
        record: Mapping[str, Any] = json.loads(path.read_text())
        missing = {f.name for f in fields(cls) if f.default is MISSING} - set(record)
        if missing:
            raise CheckpointError(f"{path} lacks {', '.join(sorted(missing))}")
        values: dict[str, Any] = {
            f.name: tuple(record[f.name]) if isinstance(record[f.name], list) else record[f.name]
            for f in fields(cls)
            if f.name in record
        }
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Cell sets on the device: all that the model reads.

    Values are log1p(count * target_sum / library) / value_scale; rows under a False mask are zero
    in every field and stand at the end of their set.

    Parameters
    ----------
    control_BSG, control_mask_BS
        Control cells to be transported, an independent draw from the pool of the condition.
    summary_BUG, summary_mask_BU
        A second draw of control cells, disjoint from the first, for the population summary.
    treated_BSG, treated_mask_BS
        Observed cells of the condition; None at prediction.
    control_library_BS, treated_library_BS
        Counts per cell over the library genes (float32).
    component_BJ
        Rows of the component table (int64); ``ABSENT`` where a set has fewer components.
    dose_BJ
        Dose of each component in the source's unit (float32); NaN where there is none.
    cell_type_B, batch_B
        Index into the vocabulary (int64); ``ABSENT`` = unknown, or mixed for a batch.
    is_control_B
        Sets whose target is control cells (bool).
    condition_B
        Condition number in its store (int64), for messages and for prediction.
    set_index_B
        Number of the set in the whole run (int64): the key of every random draw of the model.
    """

    control_BSG: Tensor
    control_mask_BS: Tensor
    summary_BUG: Tensor
    summary_mask_BU: Tensor
    treated_BSG: Tensor | None
    treated_mask_BS: Tensor | None
    control_library_BS: Tensor
    treated_library_BS: Tensor | None
    component_BJ: Tensor
    dose_BJ: Tensor
    cell_type_B: Tensor
    batch_B: Tensor
    is_control_B: Tensor
    condition_B: Tensor
    set_index_B: Tensor

    def __post_init__(self) -> None:
        sizes: dict[str, int] = {}
        for field in fields(self):
            tensor = getattr(self, field.name)
            if tensor is None:
                continue
            letters = field.name.rsplit("_", 1)[1]
            if tensor.ndim != len(letters):
                raise ValueError(f"Batch.{field.name} has shape {tuple(tensor.shape)}")
            for letter, size in zip(letters, tensor.shape, strict=True):
                if sizes.setdefault(letter, size) != size:
                    raise ValueError(
                        f"Batch.{field.name} has {letter} = {size}, other fields have "
                        f"{letter} = {sizes[letter]}"
                    )

    @property
    def num_sets(self) -> int:
        """Sets in the batch, B."""
        return int(self.condition_B.shape[0])

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Batch:
        """Return the batch on ``device``."""
        moved: dict[str, Any] = {
            f.name: None
            if (tensor := getattr(self, f.name)) is None
            else tensor.to(device, non_blocking=non_blocking)
            for f in fields(self)
        }
        return replace(self, **moved)
