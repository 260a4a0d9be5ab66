"""``scale info``: versions and devices, and on request a preset, store, split or run in short.

scale info
scale info model=base store=data/toy
scale info store=data/tahoe split=tahoe100m_fewshot
scale info run=runs/tiny-toy
"""

import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from scale.config import Backend, InfoConfig, ModelConfig, Precision
from scale.runtime import git_state, versions
from scale.types import Vocabulary


def run(config: InfoConfig) -> int:
    """Print what was asked for and return the exit status."""
    vocabulary = _empty_vocabulary(config.num_genes)
    sections: dict[str, list[tuple[str, str]]] = {}
    if config.run is not None:
        sections[f"run {config.run}"] = list(_run(Path(config.run)))
    if config.store is not None:
        vocabulary = _store_vocabulary(config.store)
        sections[f"store {config.store}"] = list(_store(config.store))
    if config.split is not None:
        sections[f"split {config.split}"] = list(_split(config.split, config.store))
    if config.model is not None:
        sections["model"] = list(_model(config.model, vocabulary))
    sections = {"environment": list(_environment()), **sections}
    for number, (title, lines) in enumerate(sections.items()):
        print(f"{'' if number == 0 else chr(10)}{title}")
        width = max(20, *(len(name) for name, _ in lines))
        for name, text in lines:
            print(f"  {name:<{width}}  {text}")
    return 0


def _environment() -> Iterator[tuple[str, str]]:
    import torch

    from scale.model.backend import choose_provider

    yield from versions().items()
    commit = git_state()
    if commit["sha"]:
        yield "commit", commit["sha"][:12] + (" with changes" if commit["dirty"] else "")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            yield f"cuda:{index}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB"
    else:
        reason = "no device is visible" if torch.version.cuda else "torch was built without CUDA"
        yield "device", f"cpu ({reason}), {torch.get_num_threads()} threads"
    with _Remarks("scale.model.backend") as remarks:
        choose_provider(Backend.auto)
    for remark in remarks.lines:
        name, _, text = remark.partition(": ")
        yield name, text
    for name, fallback in (("SCALE_DATA", "data"), ("SCALE_RUNS", "runs")):
        yield name, os.environ.get(name) or f"{fallback} (not set)"


class _Remarks(logging.Handler):
    """Collect what a module logs about its choices, so that they are told in its own words."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._logger = logging.getLogger(name)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the text of a record."""
        self.lines.append(record.getMessage())

    def __enter__(self) -> Self:
        self._level = self._logger.level
        self._logger.setLevel(logging.INFO)
        self._logger.addHandler(self)
        return self

    def __exit__(self, *exception: object) -> None:
        self._logger.removeHandler(self)
        self._logger.setLevel(self._level)


def _model(config: ModelConfig, vocabulary: Vocabulary) -> Iterator[tuple[str, str]]:
    from scale.model.sizes import count_parameters, forward_flops_per_cell

    genes = len(vocabulary.genes)
    rows = len(vocabulary.components) + len(vocabulary.cell_types) + len(vocabulary.batches)
    count = count_parameters(config, vocabulary)
    yield (
        "set blocks",
        f"{config.num_layers} layers, width {config.hidden_size}, {config.num_heads} heads",
    )
    inside = (
        f"{config.gene_layers} layers, width {config.gene_hidden_size}, patches of "
        f"{config.gene_patch_size} genes"
        if config.gene_layers
        else "one linear map"
    )
    yield "inside a cell", inside
    yield "cells per set", f"{config.set_size}, and {config.num_summary_cells} for the summary"
    yield "genes, names", f"{genes:,} genes, {rows:,} perturbations, cell types and batches"
    yield "parameters", f"{count:,} (each further name adds {config.hidden_size:,})"
    flops = forward_flops_per_cell(config, genes)
    yield "forward pass", f"{flops / 1e6:,.1f} MFLOP per treated cell"
    yield "training step", f"{3 * flops / 1e6:,.1f} MFLOP per treated cell (recompute not counted)"
    yield from _memory(config, vocabulary)


def _memory(config: ModelConfig, vocabulary: Vocabulary) -> Iterator[tuple[str, str]]:
    """Tell what a rank holds on some layouts of ranks, as numbers of bytes per parameter."""
    from scale.train.accounting import parameters_per_rank, state_bytes

    def told(tensor_size: int = 1, num_stages: int = 1, optimizer_ranks: int = 1) -> str:
        count = parameters_per_rank(
            config, vocabulary, tensor_size=tensor_size, num_stages=num_stages
        )
        sizes = (
            state_bytes(count, precision, optimizer_ranks=optimizer_ranks) / 2**30
            for precision in (Precision.bf16, Precision.fp32)
        )
        return "{:,.2f} GiB in bf16, {:,.2f} GiB in fp32".format(*sizes)

    yield "memory of a rank", f"{told()}, and activations"
    yield "", "(weights, gradients, AdamW, moving average; the same on every data parallel rank)"
    yield "distributed optimizer", f"over 8 ranks: {told(optimizer_ranks=8)}"
    shared = (config.num_heads, config.ffn_hidden_size, config.set_size, config.num_summary_cells)
    for size in (2, 4, 8):
        if all(number % size == 0 for number in shared):
            yield "tensor parallel", f"over {size} ranks: {told(tensor_size=size)}"
    for stages in (2, 4):
        if stages <= config.num_layers:
            yield "pipeline stages", f"{stages}, the fullest: {told(num_stages=stages)}"


def _empty_vocabulary(num_genes: int) -> Vocabulary:
    """Names for a count without a store: genes, the unknown and the control."""
    return Vocabulary(
        genes=tuple(str(number) for number in range(num_genes)),
        components=("unknown", "control"),
        cell_types=(),
        batches=(),
        perturbations=(),
        control="control",
        perturbation_key="perturbation",
        cell_type_key="cell_type",
        batch_key=None,
        dose_key=None,
        separator=None,
        target_sum=10_000.0,
        value_scale=1.0,
    )


def _store_vocabulary(path: str) -> Vocabulary:
    from scale.data.store import CellSetStore
    from scale.data.vocabulary import make_vocabulary

    with CellSetStore.open(path) as store:
        return make_vocabulary(
            store, list(store.conditions.index), target_sum=10_000.0, value_scale=1.0
        )


def _store(path: str) -> Iterator[tuple[str, str]]:
    from scale.data.store import CellSetStore

    with CellSetStore.open(path) as store:
        treated = store.conditions[~store.conditions["is_control"]]
        controls = store.conditions[store.conditions["is_control"]]
        size = sum(file["size"] for file in store.manifest["files"])
        yield "cells", f"{store.manifest['num_cells']:,} in {size / 1e6:,.1f} MB"
        yield "genes", f"{store.num_genes:,}"
        cells = treated["num_cells"]
        yield (
            "treated conditions",
            f"{len(treated):,} of {treated['perturbation'].nunique():,} perturbations in "
            f"{treated['cell_type'].nunique():,} cell types; {cells.min():,} to {cells.max():,} "
            f"cells, median {cells.median():,.0f}",
        )
        yield (
            "controls",
            f"{controls['num_cells'].sum():,} cells in {len(controls):,} pools, label "
            f"{store.control!r}",
        )
        columns = {name: value for name, value in store.columns.items() if value is not None}
        yield "columns", ", ".join(f"{name}={value}" for name, value in columns.items())
        yield "counts", str(store.manifest["counts"])
        yield "made by", str(store.manifest["created_by"])
        yield "fingerprint", store.fingerprint


def _split(file: str, address: str | None) -> Iterator[tuple[str, str]]:
    """Tell what a split holds out, and of a store how many conditions and cells, and what misses.

    Contradictions are errors here as in training. Names that are not in the data are listed, all of
    them: with them training stops, unless data.unknown=warn.
    """
    from scale.data.split import Split
    from scale.data.split_file import find_split_file
    from scale.data.store import CellSetStore

    split = Split.read(file)
    yield "file", str(find_split_file(file))
    yield "contexts are", f"values of {split.context}"
    for context, part in split.zeroshot.items():
        yield context, f"all is {part}"
    for context, lists in split.fewshot.items():
        yield context, f"{len(lists.val):,} labels are val, {len(lists.test):,} are test"
    if address is None:
        return
    with CellSetStore.open(address) as store:
        table = store.conditions
        found = split.compare(table, store.perturbations, labels=store.labels)
    num_cells_C, is_control_C = table["num_cells"], table["is_control"].to_numpy(dtype=bool)
    for part in ("train", "val", "test", "unused"):
        here_C = (found.part_C == part) & ~is_control_C
        cells = f"{num_cells_C[here_C].sum():,} cells of {here_C.sum():,} treated conditions"
        groups = table[here_C][split.context].nunique()
        yield part, f"{cells} in {groups:,} values of {split.context}" if here_C.any() else "none"
    in_train = num_cells_C[is_control_C & (found.part_C == "train")].sum()
    yield "controls", f"{num_cells_C[is_control_C].sum():,} cells, {in_train:,} of them in train"
    yield "not in the data", f"{len(found.missing):,} names of the split"
    for name in found.missing:
        yield "", name
    yield "not in its context", f"{len(found.unmeasured):,} labels of the split"
    for name in found.unmeasured:
        yield "", name


def _run(path: Path) -> Iterator[tuple[str, str]]:
    record = path / "run.json"
    if not record.is_file():
        raise FileNotFoundError(f"{path} is no run: it has no run.json")
    starts: list[dict[str, Any]] = json.loads(record.read_text())["starts"]
    last = starts[-1]
    yield "starts", f"{len(starts)}, the last at {last['started']} on {last['host']}"
    ended = f"{last['exit_reason']} at {last['ended']}" if last["ended"] else "running, or killed"
    yield "ended", ended
    yield "command", " ".join(["scale", *last["argv"][1:]])
    yield "made by", ", ".join(f"{name} {text}" for name, text in last["versions"].items())
    yield from _costs(last)
    names = sorted(p.name for p in (path / "checkpoints").glob("step_*") if _is_whole(p))
    yield "checkpoints", ", ".join(names) or "none"
    yield "export", "yes" if (path / "export").is_dir() else "no"
    for name, value in _last_metrics(path / "metrics.jsonl").items():
        yield name, f"{value:,.5g}" if isinstance(value, float) else str(value)


def _costs(start: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Tell the size of a trained model, and what the device reached when the run was started."""
    if "parameters" in start:
        yield "parameters", f"{start['parameters']:,}"
        yield "training step", f"{start['flops_per_cell'] / 1e6:,.1f} MFLOP per treated cell"
    if start.get("ceiling_tflops_per_second") is not None:
        yield "ceiling", f"{start['ceiling_tflops_per_second']:,.0f} TFLOP/s in a matrix product"


def _is_whole(checkpoint: Path) -> bool:
    return (checkpoint / "manifest.json").is_file() and checkpoint.suffix != ".partial"


def _last_metrics(path: Path) -> dict[str, Any]:
    """Return the newest value of each metric of a run."""
    newest: dict[str, Any] = {}
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                newest |= json.loads(line)
            except json.JSONDecodeError:  # the line a killed run was writing
                warnings.warn(f"{path} has a line that was cut", stacklevel=2)
    return newest
