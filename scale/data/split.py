"""Which (context, perturbation) is training, validation or test data: the community's split files.

The TOML files of STATE and cell-load are read unchanged, but strictly: names that are not in the
data, a label in two lists and a context in two tables are errors here, because each of them makes
a benchmark of something else than its file says. A store knows nothing of splits; one is applied
to its conditions when a run starts, or compared with them by ``scale info``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from scale.config import HeldoutControls, Unknown
from scale.data.split_file import (
    TEST,
    TRAIN,
    VAL,
    FewShot,
    canonical_label,
    listed,
    read_split_file,
)
from scale.data.split_labels import LabelMatcher
from scale.draws import derive
from scale.runtime import atomic_path
from scale.types import Perturbation, SplitError, did_you_mean

if TYPE_CHECKING:
    from scale.data.store import CellSetStore

logger = logging.getLogger(__name__)

UNUSED = "unused"
_FEW_SHOT = 0x4653
"""Word of the key that orders the perturbations of a context in :func:`write_few_shot`."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a split makes of the conditions of a store."""

    part_C: npt.NDArray[np.str_]
    """Part of every condition: train, val, test or unused."""
    missing: list[str]
    """Names of the split that are nowhere in the data, the first ones with the nearest there."""
    unmeasured: list[str]
    """Labels that the data has, but not in the context that lists them."""


@dataclass(frozen=True, slots=True)
class Split:
    """A split as a file states it, without the data it is for.

    A label of a list is compared with the conditions of a store in two ways: with the source's own
    label, and as a canonical perturbation, so that blanks and the spelling of doses cannot miss.
    Where doses have a column of their own, the source's label is the plain drug name, and stands
    for all its doses; the full form ``[('drug', 0.5, 'uM')]`` stands for one of them. Where the
    label is itself such a list, a plain name matches nothing and is reported as unknown.

    Parameters
    ----------
    name
        For messages.
    context
        Column of the conditions that contexts are values of: ``cell_type`` or ``batch``.
    is_training
        Whether contexts that are not named are training data; else they are not used.
    zeroshot
        Context -> the part that all its treated cells belong to.
    fewshot
        Context -> the labels held out in it.
    """

    name: str
    context: str = "cell_type"
    is_training: bool = True
    zeroshot: Mapping[str, str] = field(default_factory=dict)
    fewshot: Mapping[str, FewShot] = field(default_factory=dict)

    @classmethod
    def everything(cls) -> Split:
        """Return the split of a run without a file: all is training data."""
        return cls("no split")

    @classmethod
    def read(cls, path: Path | str) -> Split:
        """Read a split file, or one that ships by its bare name, as ``tahoe100m_fewshot``.

        Raises
        ------
        SplitError
            If there is no such file, it cannot be read, has a table, key or value that means
            nothing, or contradicts itself.
        """
        file = read_split_file(path)
        return cls(str(path), file.context, file.is_training, file.zeroshot, file.fewshot)

    @property
    def sha256(self) -> str:
        """Hash of what the split says; comments, order and dataset names do not count."""
        fewshot = {
            context: [
                sorted({canonical_label(label) for label in part}) for part in (f.val, f.test)
            ]
            for context, f in self.fewshot.items()
        }
        record = [self.context, self.is_training, dict(self.zeroshot), fewshot]
        return sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()

    def assign(
        self,
        conditions: pd.DataFrame,
        perturbations: Sequence[Perturbation],
        *,
        labels: Sequence[str] | None = None,
        unknown: Unknown = Unknown.error,
        heldout_controls: HeldoutControls = HeldoutControls.shared,
    ) -> npt.NDArray[np.str_]:
        """Return the part of every condition: ``train``, ``val``, ``test`` or ``unused``.

        Parameters
        ----------
        conditions, perturbations, labels, heldout_controls
            As of :meth:`compare`.
        unknown
            Whether names that are not in the data are an error or a warning.

        Raises
        ------
        SplitError
            As :meth:`compare`, and if names are not in the data, or a part that the file names
            comes out empty.
        """
        found = self.compare(
            conditions, perturbations, labels=labels, heldout_controls=heldout_controls
        )
        self._report(found.missing, unknown)
        is_treated_C = ~conditions["is_control"].to_numpy(dtype=bool)
        self._check_parts(found.part_C[is_treated_C], unknown)
        return found.part_C

    def compare(
        self,
        conditions: pd.DataFrame,
        perturbations: Sequence[Perturbation],
        *,
        labels: Sequence[str] | None = None,
        heldout_controls: HeldoutControls = HeldoutControls.shared,
    ) -> Comparison:
        """Return the part of every condition, and what of the split is not in the data.

        Parameters
        ----------
        conditions
            Table with cell_type, perturbation (number), batch and is_control, as of a store.
        perturbations, labels
            By number: what was done, and the source's text for it (None = the canonical label).
        heldout_controls
            Controls are training data. With ``excluded``, those of zero-shot contexts are not
            used; a few-shot context needs its own for the perturbations that it trains on.

        Raises
        ------
        SplitError
            If a condition is in two lists, or the control is held out.
        """
        context_C = self._contexts(conditions)
        perturbation_C = conditions["perturbation"].to_numpy(dtype=np.int64)
        is_control_C = conditions["is_control"].to_numpy(dtype=bool)
        part_C = np.full(len(conditions), TRAIN if self.is_training else UNUSED, dtype="<U6")
        missing = self._unknown_contexts(set(context_C.tolist()))
        unmeasured: list[str] = []
        for context, part in self.zeroshot.items():
            here_C = context_C == context
            part_C[here_C & ~is_control_C] = part
            is_excluded = heldout_controls is HeldoutControls.excluded
            part_C[here_C & is_control_C] = UNUSED if is_excluded else TRAIN
        matcher = LabelMatcher(perturbations, labels, set(perturbation_C.tolist()))
        controls = set(perturbation_C[is_control_C].tolist())
        for context, lists in self.fewshot.items():
            here_C = context_C == context
            part_C[here_C] = TRAIN
            found = {
                part: matcher.find(texts, f"{part} of {context!r}", missing)
                for part, texts in ((VAL, lists.val), (TEST, lists.test))
            }
            self._check_lists(context, found, controls, matcher)
            measured = set(perturbation_C[here_C].tolist())
            for part, numbers in found.items():
                part_C[here_C & np.isin(perturbation_C, list(numbers)) & ~is_control_C] = part
                unmeasured += [
                    f"{matcher.label(number)!r} in {part} of {context!r}"
                    for number in sorted(numbers - measured)
                    if measured
                ]
        return Comparison(part_C, missing, unmeasured)

    # --- checks ---------------------------------------------------------------------------------

    def _contexts(self, conditions: pd.DataFrame) -> npt.NDArray[np.object_]:
        """Return the context of every condition as text."""
        values = conditions[self.context]
        if (self.zeroshot or self.fewshot) and values.isna().any():
            raise SplitError(
                f'{self.name}: [scale] context = "{self.context}", but '
                f"{int(values.isna().sum()):,} conditions of the store have no {self.context}; "
                "prepare it with columns.batch and condition_by=batch"
            )
        return np.array([str(value).strip() for value in values], dtype=object)

    def _unknown_contexts(self, known: set[str]) -> list[str]:
        return [
            f"{self.context} {context!r} ({did_you_mean(context, sorted(known))})"
            for context in (*self.zeroshot, *self.fewshot)
            if context not in known
        ]

    def _check_lists(
        self,
        context: str,
        found: Mapping[str, set[int]],
        controls: set[int],
        matcher: LabelMatcher,
    ) -> None:
        if both := found[VAL] & found[TEST]:
            names = sorted(matcher.label(number) for number in both)
            raise SplitError(
                f"{self.name}: {len(both)} perturbations of {context!r} are in val and in test "
                f"({listed(names)}); remove them from one of the lists"
            )
        for part, numbers in found.items():
            if held := numbers & controls:
                raise SplitError(
                    f"{self.name}: the control {matcher.label(min(held))!r} is in the {part} list "
                    f"of {context!r}; controls are never held out by a list, remove it"
                )

    def _report(self, problems: list[str], unknown: Unknown) -> None:
        if not problems:
            return
        text = f"{self.name}: {len(problems)} names are not in the data: {listed(problems)}"
        if unknown is Unknown.error:
            raise SplitError(f"{text}. Correct the file, or set data.unknown=warn to go on without")
        logger.warning("%s", text)

    def _check_parts(self, part_C: npt.NDArray[np.str_], unknown: Unknown) -> None:
        """Refuse a held-out part that the file names and that no condition is in."""
        named = set(self.zeroshot.values())
        for lists in self.fewshot.values():
            named |= {VAL} if lists.val else set()
            named |= {TEST} if lists.test else set()
        for part in sorted(named - set(part_C.tolist())):
            text = f"{self.name}: no condition of the store is in the {part} part"
            if unknown is Unknown.error:
                raise SplitError(f"{text}; its perturbations were not measured in its contexts")
            logger.warning("%s", text)


# --- writing ------------------------------------------------------------------------------------


def write_few_shot(
    path: Path | str,
    store: CellSetStore,
    contexts: Sequence[str],
    *,
    train_fraction: float = 0.3,
    val_fraction: float = 0.1,
    seed: int = 0,
) -> Split:
    """Write a few-shot split of a store, and return it.

    In each context the perturbations are put in an order keyed by ``seed``, context and name; the
    first ``train_fraction`` of them stay training data, the next ``val_fraction`` are validation,
    the rest are test. All doses of an agent go to the same part. 30 % visible is STATE's rule.

    Parameters
    ----------
    path
        File to write.
    store
        Whose conditions are split.
    contexts
        Cell types to hold out.
    train_fraction, val_fraction
        Shares of a context's perturbations.
    seed
        Seed of the order.

    Raises
    ------
    SplitError
        If a context is not in the store, or a part would be empty.
    """
    treated = store.conditions[~store.conditions["is_control"].to_numpy(dtype=bool)]
    dataset = Path(store.address).name.replace(".", "_") or "store"
    lines = ["[datasets]", f'{json.dumps(dataset)} = "."', ""]
    lines += ["[training]", f'{json.dumps(dataset)} = "train"', "", "[zeroshot]"]
    for context in contexts:
        numbers = treated.loc[treated["cell_type"] == context, "perturbation"].unique().tolist()
        if not numbers:
            known = sorted(treated["cell_type"].unique())
            raise SplitError(
                f"no cell type {context!r} in {store.address}; {did_you_mean(context, known)}"
            )
        agents: dict[tuple[str, ...], set[str]] = {}
        for number in numbers:
            names = tuple(component.name for component in store.perturbations[number].components)
            agents.setdefault(names, set()).add(store.labels[number])
        ordered = sorted(agents, key=lambda names: _draw(seed, (context, *names)))
        num_train = round(train_fraction * len(ordered))
        num_val = round(val_fraction * len(ordered))
        parts = {
            VAL: ordered[num_train : num_train + num_val],
            TEST: ordered[num_train + num_val :],
        }
        if not parts[TEST]:
            raise SplitError(
                f"{context!r} has {len(ordered)} perturbations; train_fraction "
                f"({train_fraction}) and val_fraction ({val_fraction}) leave none for test"
            )
        key = json.dumps(f"{dataset}.{context}", ensure_ascii=False)
        lines += ["", f"[fewshot.{key}]"]
        for part, chosen in parts.items():
            labels = sorted(label for names in chosen for label in agents[names])
            texts = "".join(f"  {json.dumps(text, ensure_ascii=False)},\n" for text in labels)
            lines.append(f"{part} = [\n{texts}]")
    with atomic_path(Path(path)) as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    return Split.read(path)


def _draw(seed: int, names: tuple[str, ...]) -> int:
    digest = sha256(json.dumps(names).encode()).digest()
    return derive(seed, _FEW_SHOT, int.from_bytes(digest[:8], "little"))
