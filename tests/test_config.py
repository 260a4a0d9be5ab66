"""Settings: every yaml option composes under its task, keys are frozen, values are checked."""

import dataclasses
import tomllib
import types
import typing
from pathlib import Path

import pytest
import yaml

from scale import config as settings
from scale.config import SCHEMAS, PretrainConfig, compose, config_dir, from_yaml, to_yaml

ROOT = Path(__file__).resolve().parents[1]
GROUPS = sorted(folder.name for folder in config_dir().iterdir() if folder.is_dir())
GIVEN = {
    "features": ["input=drugs.csv"],
    "finetune": ["start_from=runs/x"],
    "predict": ["checkpoint=runs/x", "input=cells.h5ad"],
    "evaluate": ["predicted=a.h5ad", "observed=b.h5ad"],
}
LABELS = ["columns.perturbation=drug", "columns.cell_type=line", "control=DMSO"]
NEEDED_BY = {
    "source=h5ad": ["source.files=x.h5ad", "store=data/mine", *LABELS],
    "source=scdl": ["source.files=x.scdl", "store=data/mine", *LABELS],
    "source=store": ["source.files=data/first", "store=data/mine", *LABELS],
    "source=tahoe_parquet": ["source.files=data/*.parquet", "source.metadata=metadata"],
    "genes=list": ["genes.file=panel.txt"],
    "experiment=prepare_tahoe": ["source.files=plates/*.h5ad"],
}


def section(kind):
    choices = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return next((c for c in choices if dataclasses.is_dataclass(c)), None)


def keys(schema, prefix=""):
    for name, kind in typing.get_type_hints(schema).items():
        if (inner := section(kind)) is None:
            yield prefix + name
        else:
            yield from keys(inner, f"{prefix}{name}.")


def options():
    for group in GROUPS:
        for file in sorted((config_dir() / group).rglob("*.yaml")):
            option = file.relative_to(config_dir() / group).with_suffix("").as_posix()
            for task in SCHEMAS:
                primary = yaml.safe_load((config_dir() / f"{task}.yaml").read_text())
                entries = [e for e in primary["defaults"] if isinstance(e, dict)]
                known = {name for entry in entries for name in entry}
                if group == "experiment":
                    of_task = "ablation" if task == "pretrain" else task
                    if option.startswith((f"{of_task}/", f"{task}_")):
                        yield task, f"{group}={option}"
                elif group in known:
                    yield task, f"{group}={option}"


def composed(task, *overrides):
    return compose(task, [*GIVEN.get(task, []), *overrides], run_dir="runs/x")


@pytest.mark.parametrize(("task", "option"), list(options()))
def test_every_option_composes_under_its_task(task, option):
    config = composed(task, option, *NEEDED_BY.get(option, []))
    assert isinstance(config, SCHEMAS[task])


def test_every_yaml_file_is_an_option_of_a_task():
    reached = {option.replace("=", "/") for _, option in options()}
    files = {str(f.relative_to(config_dir()).with_suffix("")) for f in config_dir().rglob("*.yaml")}
    assert files == reached | set(SCHEMAS)


def test_keys_are_those_of_the_list():
    """A new key is a promise: add it to tests/setting_keys.txt when a reviewer has agreed."""
    listed = (ROOT / "tests" / "setting_keys.txt").read_text().split()
    assert [f"{task}.{key}" for task, schema in SCHEMAS.items() for key in keys(schema)] == listed


def test_schemas_can_be_overridden_and_refuse_stray_attributes():
    classes = [c for c in vars(settings).values() if dataclasses.is_dataclass(c)]
    assert len(classes) > 15
    for schema in classes:
        frozen = schema.__dataclass_params__.frozen
        assert not frozen, f"{schema.__name__}: Hydra cannot override a frozen one"
        assert all(field.kw_only for field in dataclasses.fields(schema)), schema.__name__
        assert "__slots__" in vars(schema), f"{schema.__name__}: a stray key would be kept"


def test_no_scalar_setting_is_named_like_a_group_folder():
    for task, schema in SCHEMAS.items():
        for name, kind in typing.get_type_hints(schema).items():
            assert name not in GROUPS or section(kind), f"{task}.{name} is taken for a group"


def test_tasks_have_runs_of_their_own():
    names = [
        yaml.safe_load((config_dir() / f"{task}.yaml").read_text())["name"] for task in SCHEMAS
    ]
    assert len(set(names)) == len(SCHEMAS)


def test_primary_files_compute_nothing_and_run_no_code():
    for file in config_dir().rglob("*.yaml"):
        text = file.read_text()
        assert "_target_" not in text
        for resolver in ("${eval", "${add", "${now"):
            assert resolver not in text


def test_defaults_are_the_laptop():
    config = composed("pretrain")
    assert config.trainer.device is settings.Device.cpu
    assert config.trainer.precision is settings.Precision.fp32
    assert config.log.wandb is settings.WandbMode.none
    assert config.parallel.tensor_model_parallel_size == 1
    assert (config.model.set_size, config.model.num_summary_cells) == (32, 32)


def test_experiment_wins_over_groups_and_the_user_over_the_experiment():
    config = composed("pretrain", "experiment=pretrain_tahoe", "trainer.max_steps=7")
    assert config.model.hidden_size == 1024
    assert config.data.control_fraction == 0.05
    assert config.trainer.max_steps == 7


def test_own_store_works_on_top_of_the_default_data(monkeypatch):
    assert composed("pretrain", "data.store=elsewhere").data.store == "elsewhere"
    monkeypatch.setenv("SCALE_DATA", "/big/disk")
    assert composed("pretrain").data.store == "/big/disk/toy"


@pytest.mark.parametrize("task", SCHEMAS)
def test_yaml_of_a_run_reads_back_equal(task, tmp_path):
    config = composed(task)
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert from_yaml(file, SCHEMAS[task]) == config


@pytest.mark.parametrize(
    ("task", "override", "message"),
    [
        ("pretrain", "model.num_heads=5", r"model.hidden_size \(128\) must be a multiple of mode"),
        ("pretrain", "model.set_size=1", r"model.set_size \(1\) must be at least 2"),
        ("pretrain", "trainer.max_steps=0", r"trainer.max_steps \(0\) must be above 0"),
        ("pretrain", "trainer.max_steps=eight", r"'eight' .* Integer \(trainer.max_steps\)"),
        ("pretrain", "log.wandb=onlin", r"expected one of \[none, offline, online\] \(log.wandb\)"),
        ("pretrain", "model=bse", "no option 'bse' in 'model'; did you mean 'base'"),
        ("pretrain", "experiment=ablation/meen", "did you mean 'ablation/mean'"),
        ("pretrain", "model=huge", "no option 'huge' in 'model'; known: base, large, small"),
        ("pretrain", "data.control_fraction=1", r"data.control_fraction \(1.0\) must be in"),
        ("pretrain", "objective.time=zero", None),
        ("pretrain", "objective.prior=gaussian", None),
        ("pretrain", "experiment=ablation/velocty", "no option 'ablation/velocty' in 'experiment'"),
        ("pretrain", "objective.num_steps=0", r"objective.num_steps \(0\) must be above 0"),
        ("pretrain", "objective.latent_size=8", r"space=gene has no autoencoder .*latent_size \(8"),
        ("pretrain", "objective.space=latent", r"objective.space=latent needs objective.latent_s"),
        ("pretrain", "optimizer.betas=[0.9]", "must be two numbers"),
        ("prepare", "genes=list", "give genes.file"),
        ("prepare", "minimum_cells=0", r"minimum_cells \(0\) must be above 0"),
        ("predict", "store=data/toy", "give either input"),
        ("predict", "part=train", "must be val or test"),
        ("evaluate", "predicted=[]", "predicted is empty"),
        ("demo", "steps=0", r"steps \(0\) must be above 0"),
    ],
)
def test_wrong_values_are_named_with_their_key(task, override, message):
    if message is None:
        composed(task, override)
    else:
        with pytest.raises(ValueError, match=message):
            composed(task, override)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["objective=scale_paper", "objective.decoder=null"],
            "objective.space=latent needs objective.decoder: negative_binomial",
        ),
        (
            ["objective=scale_paper", "objective.reconstruction_weight=0"],
            "objective.space=latent needs objective.reconstruction_weight above 0",
        ),
        (
            ["experiment=ablation/velocity", "objective.head=direct"],
            "objective.prediction=velocity .* objective.head=direct",
        ),
        (
            ["experiment=ablation/time_zero", "objective.num_steps=2"],
            "objective.time=zero allows objective.num_steps=1 only",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        composed("pretrain", *overrides)


def test_experiments_can_be_put_together():
    config = composed("pretrain", "experiment=[pretrain_tahoe,ablation/fusion_sum]")
    assert (config.model.hidden_size, config.model.fusion) == (1024, settings.Fusion.sum)


@pytest.mark.parametrize("task", GIVEN)
def test_missing_settings_are_named(task):
    with pytest.raises(ValueError, match=r"missing mandatory value") as caught:
        compose(task, [], run_dir="runs/x")
    assert GIVEN[task][0].partition("=")[0] in str(caught.value)


def test_typo_in_the_yaml_of_a_run_is_found(tmp_path):
    text = to_yaml(composed("pretrain")).replace("hidden_size:", "hiden_size:", 1)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(Exception, match="hiden_size"):
        from_yaml(tmp_path / "config.yaml", PretrainConfig)


def test_settings_made_in_python_are_checked():
    config = composed("pretrain")
    assert settings.check(config) == config
    config.model.num_heads = 5
    with pytest.raises(ValueError, match="multiple of model.num_heads"):
        settings.check(config)


def test_constraints_allow_what_the_package_asks_for():
    requirements = pytest.importorskip("packaging.requirements")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            pinned[name.lower().replace("_", "-")] = version
    assert "torch" not in pinned
    for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        requirement = requirements.Requirement(text)
        if requirement.name != "torch":
            assert requirement.specifier.contains(pinned[requirement.name.lower()]), text
