"""From yaml and overrides to checked dataclasses, and back: what this package asks of Hydra."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from scale.config.roots import SCHEMAS
from scale.overrides import check_keys, explain


def config_dir() -> Path:
    """Return the folder of yaml files: inside the wheel, or at the top of a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "pretrain.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no configs beside {package}; install the package again")


def register() -> None:
    """Make the root dataclasses known to Hydra as ``<task>_schema``."""
    store = ConfigStore.instance()
    for task, schema in SCHEMAS.items():
        store.store(name=f"{task}_schema", node=schema)


def to_dataclass(config: DictConfig) -> Any:
    """Return the checked root dataclass of a composed config; runs every ``__post_init__``.

    Raises
    ------
    ValueError
        If a setting is missing or has a wrong value.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        values = "values" if len(missing) > 1 else "value"
        raise ValueError(f"missing mandatory {values}: {', '.join(missing)}")
    try:
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ValueError(explain(error, config_dir())) from error


def check(config: Any) -> Any:
    """Return a copy of a settings dataclass made in Python, with every check run."""
    return to_dataclass(OmegaConf.structured(config))


def to_yaml(config: Any) -> str:
    """Return a settings dataclass as yaml, as ``config.yaml`` of a run holds it."""
    return str(OmegaConf.to_yaml(OmegaConf.structured(config)))


def from_yaml(path: Path, schema: type) -> Any:
    """Read the ``config.yaml`` of a run back into its dataclass.

    Raises
    ------
    ValueError
        If the file holds a key that is no setting, or a wrong value.
    """
    loaded = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(path))
    return OmegaConf.to_object(loaded)


def compose(task: str, overrides: Sequence[str] = (), *, run_dir: Path | str) -> Any:
    """Compose the settings of a task from Python, as the command line does.

    Parameters
    ----------
    task
        One of ``SCHEMAS``.
    overrides
        ``key=value`` or ``group=option``, as on the command line.
    run_dir
        The run's directory (the command line takes it from Hydra).

    Raises
    ------
    ValueError
        If a key is no setting, an option does not exist, or a value is missing or wrong.

    Examples
    --------
    >>> compose("pretrain", ["trainer.max_steps=5"], run_dir="runs/mine").trainer.max_steps
    5
    """
    register()
    given = [*overrides, f"run_dir={run_dir}", f"name={Path(run_dir).name}"]
    given = check_keys(SCHEMAS[task], given)
    # A task that composes others (the demo) runs inside a Hydra job already: step out and back.
    outer, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        with initialize_config_dir(str(config_dir()), version_base=None):
            config = hydra_compose(task, overrides=given)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error, config_dir())) from error
    finally:
        GlobalHydra.instance().hydra = outer
    return to_dataclass(config)
