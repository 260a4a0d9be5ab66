"""``scale finetune``: go on from a trained model on another store or split.

scale finetune start_from=runs/tahoe-base data.store=data/mine name=mine

The sizes are those of the checkpoint. New perturbations, cell types and batches get rows of their
own; the list of genes stays, unless ``replace_genes``.
Features of perturbations that the checkpoint has are kept; a file adds those of new ones.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from scale.config import FinetuneConfig
from scale.data.features import read_features
from scale.data.module import training_conditions
from scale.data.store import CellSetStore
from scale.data.vocabulary import extend_vocabulary
from scale.model.model import ScaleModel
from scale.model.resize import extend_state
from scale.runtime import StopSignal
from scale.tasks import training
from scale.train.checkpoint import place_weights
from scale.train.export import find_weights, read_average, read_record
from scale.train.parallel import Layout, on_first_rank
from scale.train.record import ModelRecord
from scale.types import Vocabulary

logger = logging.getLogger(__name__)

_LR_FRACTION = 1 / 3
"""Of the model's rate, where ``optimizer.lr`` is not given and no layer starts anew."""


def run(config: FinetuneConfig, stop: StopSignal) -> int:
    """Train, or go on; return the exit status (75: stopped with a checkpoint, start me again)."""
    return training.run_training("finetune", config, stop, _prepare)


def _prepare(
    config: FinetuneConfig, layout: Layout, resumed: training.Resumed | None
) -> training.Prepared:
    """Make the model of the checkpoint around the names of both, old and new."""
    start = None
    if resumed is None:
        start = on_first_rank(layout, lambda: _find_start(Path(config.start_from)))
        sizes, old = read_record(start)
        _check_transport(config, sizes)
        vocabulary = _extended(config, old)
    else:
        sizes, vocabulary = resumed.record, resumed.vocabulary
    training.check_sizes(config, sizes.model, layout)
    record = ModelRecord(
        model=sizes.model, objective=config.objective, precision=config.trainer.precision
    )
    seed = config.trainer.seed
    data = training.open_data(config.data, record.model, layout, seed=seed, vocabulary=vocabulary)
    model = training.build_model(
        record, vocabulary, layout, seed=seed, recompute=config.parallel.recompute
    )
    if start is not None:
        training.set_features(model, config.data)
        _take_weights(model, start, old, record, layout)
        if config.replace_genes:
            training.set_statistics(model, data)
    if config.freeze_encoder:
        model.freeze_encoder()
    return training.Prepared(
        model=model,
        record=record,
        data=data,
        peak_lr=_peak_rate(config, record),
    )


def _peak_rate(config: FinetuneConfig, record: ModelRecord) -> float:
    """Return the given rate; else the model's for genes that start anew, and a third of it."""
    if config.optimizer.lr is not None:
        return config.optimizer.lr
    return record.model.lr * (1.0 if config.replace_genes else _LR_FRACTION)


def _find_start(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"start_from: no run, checkpoint or export at {path}")
    return find_weights(path)


def _check_transport(config: FinetuneConfig, start: ModelRecord) -> None:
    """Refuse another kind of transport than the weights were trained for."""
    for name in ("space", "prior", "prediction", "head", "latent_size", "decoder"):
        ours, theirs = (
            getattr(value, "value", value)
            for value in (getattr(config.objective, name), getattr(start.objective, name))
        )
        if ours != theirs:
            wanted = "null" if theirs is None else theirs
            raise ValueError(
                f"objective.{name} is {ours}, the model of {config.start_from} was trained with "
                f"{theirs}; set objective.{name}={wanted}"
            )


def _extended(config: FinetuneConfig, old: Vocabulary) -> Vocabulary:
    """Return the vocabulary of the checkpoint with the new names of the store."""
    data = config.data
    store = CellSetStore.open(data.store, cache_dir=data.cache_dir, cache_bytes=data.cache_bytes)
    try:
        features = read_features(data.perturbation_features)
        new = extend_vocabulary(old, store, training_conditions(store, data), features)
        if config.replace_genes:
            new = replace(new, genes=store.genes.symbols)
            _check_genes(config, old.genes, new.genes)
    finally:
        store.close()
    logger.info(
        "start from %s: %d new perturbation components, %d new cell types, %d new batches%s",
        config.start_from,
        len(new.components) - len(old.components),
        len(new.cell_types) - len(old.cell_types),
        len(new.batches) - len(old.batches),
        f", {len(set(new.genes) - set(old.genes)):,} new genes of {len(new.genes):,}"
        if config.replace_genes
        else "",
    )
    return new


def _check_genes(config: FinetuneConfig, old: Sequence[str], new: Sequence[str]) -> None:
    """Refuse genes that start anew in a frozen encoder; warn if all do."""
    known = set(old)
    fresh = [gene for gene in new if gene not in known]
    if fresh and config.freeze_encoder:
        raise ValueError(
            f"freeze_encoder=true would leave {len(fresh):,} new genes of {config.data.store} "
            f"({', '.join(fresh[:3])}, ...) with weights that were never trained; set "
            "freeze_encoder=false, or replace_genes=false to leave them out"
        )
    if len(fresh) == len(new):
        logger.warning(
            "none of the %d genes of %s (%s, ...) is among those of %s (%s, ...): all layers that "
            "touch genes start anew",
            len(new),
            config.data.store,
            new[0],
            config.start_from,
            old[0],
        )


def _take_weights(
    model: ScaleModel, start: Path, old: Vocabulary, record: ModelRecord, layout: Layout
) -> None:
    """Give a new model the moving average of a trained one, row by row where tables grew."""
    trained = training.build_model(record, old, layout, seed=0)
    place_weights(trained, read_average(start))
    model.load_state_dict(
        extend_state(model.state_dict(), trained.state_dict(), old, model.vocabulary)
    )
