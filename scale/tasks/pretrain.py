"""``scale pretrain``: a model from scratch on the training conditions of a store.

scale pretrain                                              # tiny model, toy store, CPU
torchrun --standalone --nproc-per-node 8 -m scale pretrain model=base data=tahoe trainer=gpu
"""

from scale.config import PretrainConfig
from scale.runtime import StopSignal
from scale.tasks import training
from scale.train.parallel import Layout
from scale.train.record import ModelRecord


def run(config: PretrainConfig, stop: StopSignal) -> int:
    """Train, or go on; return the exit status (75: stopped with a checkpoint, start me again)."""
    return training.run_training("pretrain", config, stop, _prepare)


def _prepare(
    config: PretrainConfig, layout: Layout, resumed: training.Resumed | None
) -> training.Prepared:
    """Open the data and make the model around its names."""
    training.check_sizes(config, config.model, layout)
    record = ModelRecord(
        model=config.model, objective=config.objective, precision=config.trainer.precision
    )
    data = training.open_data(
        config.data,
        config.model,
        layout,
        seed=config.trainer.seed,
        vocabulary=None if resumed is None else resumed.vocabulary,
    )
    model = training.build_model(
        record,
        data.vocabulary,
        layout,
        seed=config.trainer.seed,
        recompute=config.parallel.recompute,
    )
    if resumed is None:
        training.set_statistics(model, data)
        training.set_features(model, config.data)
    return training.Prepared(
        model=model,
        record=record,
        data=data,
        peak_lr=config.model.lr if config.optimizer.lr is None else config.optimizer.lr,
    )
