"""What a label of a split file means: its perturbations, whatever blanks and spelling of doses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from scale.data.split_file import canonical_label
from scale.types import Perturbation, SourceError, did_you_mean

_MAX_HINTS = 20


class LabelMatcher:
    """Finds the perturbations of a store that a label of a split file stands for.

    Parameters
    ----------
    perturbations, labels
        By number: what was done, and the source's text for it (None = the canonical label).
    numbers
        Those that the store has conditions of.
    """

    def __init__(
        self,
        perturbations: Sequence[Perturbation],
        labels: Sequence[str] | None,
        numbers: set[int],
    ) -> None:
        self._labels = {
            n: (perturbations[n].label if labels is None else labels[n]).strip() for n in numbers
        }
        self._by_text: dict[str, set[int]] = {}
        self._hints: dict[str, str] = {}
        for n in sorted(numbers):
            for text in _spellings(perturbations[n], self._labels[n]):
                self._by_text.setdefault(text, set()).add(n)

    def label(self, number: int) -> str:
        """Return the source's text for a perturbation."""
        return self._labels[number]

    def find(self, texts: Iterable[str], where: str, problems: list[str]) -> set[int]:
        """Return the perturbations behind the labels; unknown ones are added to ``problems``."""
        found: set[int] = set()
        for text in texts:
            numbers = next((self._by_text[t] for t in _forms(text) if t in self._by_text), None)
            if numbers is None:
                problems.append(f"{text!r} in {where}{self._hint(text)}")
            else:
                found |= numbers
        return found

    def _hint(self, text: str) -> str:
        """Return the nearest names; for the first texts only, as looking for them is slow."""
        if text not in self._hints and len(self._hints) < _MAX_HINTS:
            self._hints[text] = f" ({did_you_mean(text.strip(), sorted(self._by_text))})"
        return self._hints.get(text, "")


def _spellings(perturbation: Perturbation, label: str) -> set[str]:
    """Return the texts that stand for a perturbation: its label, and its canonical forms."""
    texts = {label, perturbation.label}
    if all(c.dose is not None and c.unit is None for c in perturbation.components):
        # A dose column without a unit cannot contradict the unit of a split file.
        texts.add(_without_units(perturbation))
    return texts


def _forms(text: str) -> list[str]:
    """Return how a label of a split file may be known: as it stands, canonical, without units."""
    forms = [text.strip(), canonical_label(text)]
    try:
        parsed = Perturbation.parse(text)
    except SourceError:
        return forms
    return [*forms, _without_units(parsed)] if parsed.components[0].dose is not None else forms


def _without_units(perturbation: Perturbation) -> str:
    return repr([(c.name, c.dose) for c in perturbation.components])
