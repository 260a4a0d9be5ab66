"""Which conditions of a store a split holds out: what ``predict`` makes and ``evaluate`` scores."""

from dataclasses import dataclass

from scale.data.split import Split
from scale.data.store import CellSetStore


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Condition ids of a part of a split, and of the controls of their cell types."""

    treated: list[int]
    controls: list[int]
    num_cell_types: int


def held_out(store: CellSetStore, split: Split, part: str) -> HeldOut:
    """Return the conditions of ``part``, in the order of the store.

    Raises
    ------
    ValueError
        If the part is empty.
    SplitError
        If the split does not fit the store.
    """
    table = store.conditions
    part_C = split.assign(table, store.perturbations, labels=store.labels)
    is_control_C = table["is_control"].to_numpy(dtype=bool)
    treated_C = (part_C == part) & ~is_control_C
    if not treated_C.any():
        raise ValueError(f"the split has no {part} conditions in {store.address}")
    cell_types = set(table.loc[treated_C, "cell_type"])
    controls_C = is_control_C & table["cell_type"].isin(cell_types).to_numpy()
    return HeldOut(
        [int(i) for i in table.index[treated_C]],
        [int(i) for i in table.index[controls_C]],
        len(cell_types),
    )
