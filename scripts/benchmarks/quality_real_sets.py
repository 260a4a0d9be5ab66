"""Two real sets for the quality benchmark, cut so that training sees nothing of what judges it.

``doubles``: K562 cells under gene activation (Norman et al. 2019, as the developer set of
perturbench has it: 500 genes, 3,375 cells). Held out are the five doubles both of whose singles
were measured; other doubles are training data. Rivals beside the baselines of ``scale evaluate``:
the cells of the single with the larger effect, and the cells of all training doubles.

``replicates``: THP-1 cells under 25 gene knock-outs in three replicates (Papalexi et al. 2021, 299
genes). The replicate is the context; of every gene one replicate is held out, the next one with
the next seed, so that three seeds hold out each (gene, replicate) pair once.

Half of the control cells are for training, input and baselines; the other half, the reference of
the observed change, stands in no store: where controls are few, a model that saw them would know
the noise of the answer. The seed decides the halves.

Shapes: N = cells, G = genes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
from command import ROOT
from quality_runs import SPLIT, Dataset, make_dataset

from scale.evaluate.protocol import split_controls
from scale.evaluate.statistics import column_means, gene_tests

REAL_DATA = ROOT.parent / "shared" / "data"
TARGET_SUM = 1e4
SEPARATOR = "+"
LIBRARY, CONTEXT, LABEL, CONTROL = "library", "context", "perturbation", "control"
STRONG_GENES = 10
"""A knock-out is strong where each of its training replicates has this many significant genes."""
_PURE_GUIDES = 0.8
"""Share of a cell's guide molecules that must be of one guide."""
_FEWEST_CELLS = 30
"""A gene has this many cells in every replicate, or is left out: ``scale evaluate`` asks for it."""


@dataclass(frozen=True, slots=True)
class RealSet:
    """A real set: how its cells are read, and what is held out of it with a seed.

    Parameters
    ----------
    name, title, unit
        In rows, above the table, and of what intervals are over.
    file
        Below ``REAL_DATA``.
    read
        Cells (counts; obs: context, perturbation, library), with the control called ``control``.
    hold_out
        Context and perturbation of each treated condition, seed -> which are held out.
    rivals
        Methods that ours is compared with.
    settings
        Of ``pretrain``, beyond the defaults.
    """

    name: str
    title: str
    unit: str
    file: str
    read: Callable[[Path], ad.AnnData]
    hold_out: Callable[[pd.DataFrame, int], npt.NDArray[np.bool_]]
    rivals: tuple[str, ...]
    settings: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """Where its cells are, if they are there."""
        return REAL_DATA / self.file


@dataclass(frozen=True, slots=True)
class Judged:
    """A real set with one seed: what is trained on, and what it is judged by."""

    data: Dataset
    """Training cells and input controls as a store; its split holds nothing out."""
    folder: Path

    @property
    def observed(self) -> Path:
        """Held-out cells, and all controls with their halves."""
        return self.folder / "observed.h5ad"

    @property
    def training_counts(self) -> Path:
        """Training cells with the input half of the controls, as counts."""
        return self.folder / "training.h5ad"

    @property
    def training(self) -> Path:
        """Training cells for the baselines, log1p with counts."""
        return self.folder / "training_logs.h5ad"

    @property
    def controls(self) -> Path:
        """Input controls as counts."""
        return self.folder / "controls.h5ad"

    @property
    def conditions(self) -> Path:
        """Held-out conditions, their numbers of cells, and whether training calls them strong."""
        return self.folder / "conditions.tsv"

    @property
    def drawn(self) -> dict[str, Path]:
        """Predictions that are training cells, drawn again."""
        return {path.stem: path for path in sorted((self.folder / "rivals").glob("*.h5ad"))}


# --- reading ------------------------------------------------------------------------------------


def _read_k562(path: Path) -> ad.AnnData:
    cells = ad.read_h5ad(path)
    cells = cells[cells.obs["cell_type"] == "k562"]
    return _cells(cells, cells.obs["cell_type"], cells.obs["perturbation"], "size_factor_total")


def _read_thp1(path: Path) -> ad.AnnData:
    cells = ad.read_h5ad(path)
    cells = cells[cells.obs["guide_umi"] >= _PURE_GUIDES * cells.obs["guide_umi_total"]]
    label = cells.obs["perturbation"].astype(str).replace("non-targeting", CONTROL)
    cells = _cells(cells, cells.obs["bio_rep"], label, None)
    fewest = cells.obs.groupby([LABEL, CONTEXT]).size().unstack(fill_value=0).min(axis=1)
    return cells[cells.obs[LABEL].isin(fewest.index[fewest >= _FEWEST_CELLS])].copy()


def _cells(
    cells: ad.AnnData, context: pd.Series, label: pd.Series, library: str | None
) -> ad.AnnData:
    counts = sp.csr_matrix(cells.X, dtype=np.float32)
    total_N = cells.obs[library] if library else np.asarray(counts.sum(axis=1)).ravel()
    obs = pd.DataFrame(
        {
            CONTEXT: context.astype(str).to_numpy(),
            LABEL: label.astype(str).to_numpy(),
            LIBRARY: np.asarray(total_N, dtype=np.float64),
        },
        index=cells.obs_names.astype(str),
    )
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=cells.var_names.astype(str)))


# --- what is held out -----------------------------------------------------------------------------


def doubles_of_singles(labels: set[str]) -> set[str]:
    """Return the doubles both of whose singles are among the labels.

    Examples
    --------
    >>> sorted(doubles_of_singles({"A", "B", "A+B", "B+C"}))
    ['A+B']
    """
    return {x for x in labels if SEPARATOR in x and set(x.split(SEPARATOR)) <= labels}


def _hold_out_doubles(conditions: pd.DataFrame, seed: int) -> npt.NDArray[np.bool_]:
    return conditions[LABEL].isin(doubles_of_singles(set(conditions[LABEL]))).to_numpy()


def _hold_out_replicates(conditions: pd.DataFrame, seed: int) -> npt.NDArray[np.bool_]:
    return rotated(conditions[CONTEXT], conditions[LABEL], seed)


def rotated(context: pd.Series, label: pd.Series, seed: int) -> npt.NDArray[np.bool_]:
    """Return one context of each label, the next one with the next seed.

    Examples
    --------
    >>> table = pd.DataFrame({"c": ["x", "y", "x", "y"], "p": ["A", "A", "B", "B"]})
    >>> [rotated(table["c"], table["p"], seed).tolist() for seed in (0, 1)]
    [[True, False, False, True], [False, True, True, False]]
    """
    contexts, labels = sorted(set(context)), sorted(set(label))
    place_C = context.map({c: i for i, c in enumerate(contexts)})
    turn_C = label.map({p: i for i, p in enumerate(labels)})
    return np.asarray((turn_C + seed) % len(contexts) == place_C)


K562 = RealSet(
    name="doubles",
    title="K562, gene activation: held-out doubles of seen singles",
    unit="doubles",
    file="perturbench_devel/devel_counts.h5ad",
    read=_read_k562,
    hold_out=_hold_out_doubles,
    rivals=("additive", "stronger_single"),
)
THP1 = RealSet(
    name="replicates",
    title="THP-1, gene knock-out: held-out (gene, replicate) pairs",
    unit="genes",
    file="papalexi2021_thp1/papalexi2021_20729x299_counts.h5ad",
    read=_read_thp1,
    hold_out=_hold_out_replicates,
    rivals=("additive", "context_transfer"),
    settings=("experiment=pretrain_replicates",),
)
SETS = (K562, THP1)


# --- writing --------------------------------------------------------------------------------------


def judged(real: RealSet, seed: int) -> Judged:
    """Return a set with what is held out with a seed."""

    def write(folder: Path) -> list[str]:
        _write(real, seed, folder)
        return [
            *("source=h5ad", f"source.files=[{folder / 'training.h5ad'}]", "counts=X", "genes=all"),
            *(f"columns.perturbation={LABEL}", f"columns.cell_type={CONTEXT}"),
            *(f"columns.library={LIBRARY}", f"columns.separator={SEPARATOR}", f"control={CONTROL}"),
        ]

    size = real.path.stat().st_size
    data = make_dataset(real.name, seed, [real.file, size, Path(__file__).read_text()], write)
    return Judged(data, data.store.parent)


def _write(real: RealSet, seed: int, folder: Path) -> None:
    cells = split_controls(
        real.read(real.path),
        perturbation_key=LABEL,
        cell_type_key=CONTEXT,
        control=CONTROL,
        seed=seed,
    )
    is_control_N = (cells.obs[LABEL] == CONTROL).to_numpy()
    treated = cells.obs[~is_control_N].groupby([CONTEXT, LABEL]).size().rename("num_cells")
    conditions = treated.reset_index()
    held = conditions[real.hold_out(conditions, seed)]
    names = pd.MultiIndex.from_frame(held[[CONTEXT, LABEL]])
    is_held_N = pd.MultiIndex.from_frame(cells.obs[[CONTEXT, LABEL]]).isin(names)
    is_input_N = is_control_N & (cells.obs["control_fold"] == 0).to_numpy()
    training = cells[is_input_N | ~(is_control_N | is_held_N)].copy()
    del training.obs["control_fold"]
    training.write_h5ad(folder / "training.h5ad")
    training[training.obs[LABEL] == CONTROL].write_h5ad(folder / "controls.h5ad")
    normalised(cells[is_control_N | is_held_N]).write_h5ad(folder / "observed.h5ad")
    # The evaluation reads the input half alone; without the other, the check of totals of so few
    # control cells would take their noise for another target sum.
    normalised(cells[is_control_N | ~is_held_N]).write_h5ad(folder / "training_logs.h5ad")
    logs = normalised(training)
    strong = strong_labels(logs)
    table = held.rename(columns={CONTEXT: "cell_type"})
    table["is_strong"] = table[LABEL].isin(strong)
    table.to_csv(folder / "conditions.tsv", sep="\t", index=False)
    (folder / SPLIT).write_text('[datasets]\nreal = "."\n\n[training]\nreal = "train"\n')
    if real is K562:
        _write_rivals(logs, held, np.random.default_rng(seed), folder / "rivals")


def normalised(cells: ad.AnnData) -> ad.AnnData:
    """Return log1p of counts per ``TARGET_SUM`` of the library, with the counts as a layer."""
    counts = sp.csr_matrix(cells.X, dtype=np.float32)
    factor_N = TARGET_SUM / np.maximum(cells.obs[LIBRARY].to_numpy(np.float64), 1.0)
    values = sp.csr_matrix((sp.diags(factor_N) @ counts).log1p(), dtype=np.float32)
    return ad.AnnData(values, obs=cells.obs, var=cells.var, layers={"counts": counts})


def strong_labels(training: ad.AnnData) -> set[str]:
    """Return the perturbations with many significant genes in each of their training contexts."""
    values = sp.csr_matrix(training.X)
    fewest: dict[str, int] = {}
    groups = training.obs.groupby([CONTEXT, LABEL], observed=True).indices
    for context in sorted({c for c, _ in groups}):
        control = values[groups[context, CONTROL]]
        labels = [p for c, p in groups if c == context and p != CONTROL]
        blocks = [values[groups[context, p]] for p in labels]
        tests = gene_tests(control, blocks, np.stack([column_means(block) for block in blocks]))
        for label, number in zip(labels, tests.significant_PG.sum(axis=1).tolist(), strict=True):
            fewest[label] = min(number, fewest.get(label, number))
    return {label for label, number in fewest.items() if number >= STRONG_GENES}


def _write_rivals(
    training: ad.AnnData, held: pd.DataFrame, generator: np.random.Generator, folder: Path
) -> None:
    """Write training cells, drawn again, as predictions of held-out doubles."""
    folder.mkdir()
    label_N = training.obs[LABEL].to_numpy(str)
    mean_of = {label: column_means(training.X[label_N == label]) for label in np.unique(label_N)}

    def effect(label: str) -> float:
        return float(np.linalg.norm(mean_of[label] - mean_of[CONTROL]))

    def chosen(label: str, rival: str) -> npt.NDArray[np.bool_]:
        if rival == "mean_of_doubles":
            return np.char.count(label_N, SEPARATOR) > 0
        return np.asarray(label_N == max(label.split(SEPARATOR), key=effect))

    for rival in ("stronger_single", "mean_of_doubles"):
        parts = []
        for context, label, size in held[[CONTEXT, LABEL, "num_cells"]].itertuples(index=False):
            rows = generator.choice(np.flatnonzero(chosen(label, rival)), size)
            names = [f"{label}-{i}" for i in range(size)]
            obs = pd.DataFrame({CONTEXT: context, LABEL: label}, index=names)
            parts.append(ad.AnnData(training.X[rows], obs=obs, var=training.var))
        ad.concat(parts).write_h5ad(folder / f"{rival}.h5ad")
