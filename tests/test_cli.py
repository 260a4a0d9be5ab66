"""The command line: what a mistake looks like, what the help promises, how an error ends."""

import errno
import os
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from scale.cli import guard, main
from scale.config import SCHEMAS, compose
from scale.data.store import CellSetStore
from scale.help import TASKS, overview, task_help
from scale.overrides import check_keys
from scale.runtime import EXIT_AGAIN, World, package_version, start_logging

SCALE = [sys.executable, "-m", "scale"]
SIZES = ("base", "large", "small", "tiny", "xl")
GIVEN = {
    "features": ["input=drugs.csv"],
    "finetune": ["start_from=runs/x"],
    "predict": ["checkpoint=runs/x", "input=cells.h5ad"],
    "evaluate": ["predicted=a.h5ad", "observed=b.h5ad"],
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Run in an empty directory, and leave the signals as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    monkeypatch.chdir(tmp_path)
    for name in ("SCALE_DATA", "SCALE_RUNS", "SCALE_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def command(text, capsys):
    """Return status, standard output and standard error of one command."""
    status = main(shlex.split(text))
    said = capsys.readouterr()
    return status, said.out, said.err


# --- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("pretrian", "scale: no task 'pretrian'; did you mean 'pretrain'?"),
        ("fit", "scale: no task 'fit'; known: demo, evaluate, features, finetune, info, predict, "),
        (
            "pretrain modle=base",
            "scale: no setting 'modle' in 'the config' (modle=base); did you mean 'model'?",
        ),
        (
            "pretrain trainer.max_step=3",
            "scale: no setting 'max_step' in 'trainer' (trainer.max_step=3); did you mean "
            "'max_steps'?",
        ),
        (
            "pretrain ++trainer.foo=1",
            "scale: no setting 'foo' in 'trainer' (++trainer.foo=1); known: device, log_every",
        ),
        (
            "pretrain max_steps=3",
            "scale: no setting 'max_steps' in 'the config' (max_steps=3); did you mean "
            "'trainer.max_steps'?",
        ),
        ("pretrain lr=1", "did you mean 'model.lr' or 'optimizer.lr'?"),
        ("pretrain trainer.seed.x=1", "scale: 'trainer.seed' is one value and has no 'x'"),
        ("pretrain ~data.splitt", "did you mean 'split'?"),
        ("pretrain base", "scale: 'base' is no setting; settings are written key=value"),
        ("pretrain --max-steps 5", "scale: no option '--max-steps'; settings are written key=v"),
        ("finetune model=base", "scale: no setting 'model' in 'the config' (model=base)"),
        (
            "pretrain trainer.max_steps=eight",
            "scale pretrain: Value 'eight' of type 'str' could not be converted to Integer "
            "(trainer.max_steps)",
        ),
        (
            "pretrain log.wandb=onlin",
            "scale pretrain: Invalid value 'onlin', expected one of [none, offline, online] "
            "(log.wandb)",
        ),
        ("pretrain model=bse", "scale pretrain: no option 'bse' in 'model'; did you mean 'base'"),
        (
            "pretrain model.num_heads=5",
            "scale pretrain: model.hidden_size (128) must be a multiple of model.num_heads (5)",
        ),
        ("pretrain trainer.max_steps=1,2", "scale pretrain: Ambiguous value for argument"),
        (
            "pretrain 'trainer.seed=('",
            "scale pretrain: cannot read 'trainer.seed=('; put text with ",
        ),
        ("finetune", "scale finetune: missing mandatory value: start_from"),
        ("evaluate", "scale evaluate: missing mandatory values: observed, predicted"),
        ("info store=no/such", "scale info: no/such is no store"),
        ("info run=no/such", "scale info: no/such is no run: it has no run.json"),
        ("pretrain --config-dir no/such model=tiny", "no/such' not found"),
    ],
)
def test_a_mistake_is_answered_in_one_line(typed, answer, capsys, tmp_path):
    status, out, err = command(typed, capsys)
    assert status == 1
    assert answer in err
    assert err.count("\n") == 1
    assert out == ""
    assert not any(tmp_path.rglob("*.log"))


def test_settings_error_leaves_no_empty_run_directory(capsys, tmp_path):
    command("pretrain model.num_heads=5", capsys)
    assert not (tmp_path / "runs" / "tiny-toy").exists()


@pytest.mark.parametrize(
    ("task", "typed", "path", "value"),
    [
        ("prepare", "control=DMSO (vehicle)", "control", "DMSO (vehicle)"),
        ("prepare", "control=[('DMSO_TF', 0.0, 'uM')]", "control", "[('DMSO_TF', 0.0, 'uM')]"),
        ("prepare", 'control=it\'s "x"', "control", 'it\'s "x"'),
        ("prepare", "control=back\\", "control", "back\\"),
        ("prepare", "control=0", "control", "0"),
        ("prepare", "store=/a b/c=d (1)", "store", "/a b/c=d (1)"),
        ("prepare", "where.plate=[a,b]", "where", {"plate": ["a", "b"]}),
        ("evaluate", "predicted=m=/a/b.h5ad", "predicted", ["m=/a/b.h5ad"]),
        ("evaluate", "predicted=[m=/a.h5ad, n=/b.h5ad]", "predicted", ["m=/a.h5ad", "n=/b.h5ad"]),
        (
            "predict",
            "perturbations=[Trametinib (DMSO solvate), [('A', 0.5, 'uM')],\"B, C\"]",
            "perturbations",
            ["Trametinib (DMSO solvate)", "[('A', 0.5, 'uM')]", "B, C"],
        ),
    ],
)
def test_awkward_text_arrives_as_it_was_typed(task, typed, path, value):
    config = compose(task, [*GIVEN.get(task, []), typed], run_dir="runs/x")
    assert getattr(config, path) == value


def test_sweeps_and_whole_sections_are_left_alone():
    schema = SCHEMAS["pretrain"]
    for typed in (
        "model=tiny,small",
        "trainer.seed=range(0,3)",
        "optimizer={lr: 0.1}",
        "hydra.x=1",
    ):
        assert check_keys(schema, [typed]) == [typed]


# --- help ---------------------------------------------------------------------------------------


def test_overview_names_every_task_and_fits_a_terminal(capsys):
    for typed in ("--help", "-h", ""):
        status, out, _ = command(typed, capsys)
        assert (status, out) == (0, overview())
    assert set(TASKS) == set(SCHEMAS)
    assert all(f"  {task} " in overview() for task in SCHEMAS)
    assert max(map(len, overview().splitlines())) <= 88


def test_version(capsys):
    assert command("--version", capsys) == (0, f"scale {package_version()}\n", "")


@pytest.mark.parametrize("task", SCHEMAS)
def test_help_of_a_task_promises_what_there_is(task, capsys):
    status, out, _ = command(f"{task} --help", capsys)
    assert (status, out) == (0, task_help(task))
    help_ = TASKS[task]
    assert 4 <= len(help_.settings) <= 10
    check_keys(SCHEMAS[task], [f"{s.key}={s.default}" for s in help_.settings])
    for example in help_.examples:
        scale, name, *settings = shlex.split(example)
        assert (scale, name) == ("scale", task)
        compose(task, settings, run_dir="runs/x")


@pytest.mark.parametrize("task", SCHEMAS)
def test_help_shows_the_defaults(task):
    no_choice = {(None, "start_from"), ("null", "model")}
    settings = [s for s in TASKS[task].settings if (s.default, s.key) not in no_choice]
    typed = [f"{s.key}={s.default}" for s in settings if s.default is not None and s.key != "name"]
    plain = compose(task, GIVEN.get(task, []), run_dir="runs/x")
    assert compose(task, [*typed, *GIVEN.get(task, [])], run_dir="runs/x") == plain


def test_name_in_the_help_is_the_default_name(capsys):
    for task, help_ in TASKS.items():
        for setting in help_.settings:
            if setting.key == "name":
                _, out, _ = command(f"{task} --cfg job --resolve", capsys)
                assert f"name: {setting.default}\n" in out
                assert f"run_dir: runs/{setting.default}\n" in out


# --- Hydra's switches ---------------------------------------------------------------------------


def test_cfg_shows_settings_and_runs_nothing(capsys, tmp_path):
    status, out, err = command("pretrain model=base trainer.seed=7 --cfg job", capsys)
    assert (status, err) == (0, "")
    assert "hidden_size: 1024" in out
    assert "seed: 7" in out
    assert command("pretrain --cfg job --package trainer", capsys)[1].startswith("# @package tra")
    assert not any(tmp_path.iterdir())


def test_own_options_come_from_a_config_dir(capsys, tmp_path):
    folder = tmp_path / "own" / "model"
    folder.mkdir(parents=True)
    text = "defaults: [tiny]\nhidden_size: 256\n"
    (folder / "mine.yaml").write_text(text)
    _, out, _ = command(f"pretrain --config-dir {tmp_path / 'own'} model=mine --cfg job", capsys)
    assert "hidden_size: 256" in out
    assert "num_layers: 2" in out
    (folder / "mine.yaml").write_text(text.replace("hidden", "hiden"))
    status, _, err = command(f"pretrain --config-dir {tmp_path / 'own'} model=mine", capsys)
    assert status == 1
    assert "hiden_size" in err
    assert err.count("\n") == 1


def test_multirun_gives_each_job_a_directory(capsys, tmp_path):
    status, _, _ = command("prepare -m source.num_cells=4000 seed=0,1 store='s-${seed}'", capsys)
    assert status == 0
    for seed in (0, 1):
        run = tmp_path / "runs" / "sweeps" / f"prepare-synthetic-{seed}"
        text = (run / "config.yaml").read_text()
        assert f"run_dir: runs/sweeps/prepare-synthetic-{seed}\n" in text
        assert f"seed: {seed}\n" in text
        assert (tmp_path / f"s-{seed}" / "manifest.json").is_file()
        assert str(tmp_path) not in text


def test_info_tells_versions_a_preset_a_store_and_a_run(capsys, toy_store_path):
    status, out, _ = command(f"info model=base store={toy_store_path}", capsys)
    assert status == 0
    for text in ("torch", "layers", "parameters", "treated conditions", "fingerprint"):
        assert f"  {text}" in out


def test_info_tells_what_a_preset_costs(capsys):
    status, out, _ = command("info model=base", capsys)
    lines = " ".join(out.split())
    assert status == 0
    parameters = int(lines.split("parameters ")[1].split()[0].replace(",", ""))
    assert parameters == pytest.approx(184e6, rel=0.01)
    assert "forward pass 482.0 MFLOP" in lines
    assert "training step 1,446.0 MFLOP" in lines
    gib = parameters * 22 / 2**30  # weights, fp32 copies, gradients, two moments, average
    assert f"memory of a rank {gib:.2f} GiB in bf16" in lines
    assert "distributed optimizer over 8 ranks: " in lines
    assert "tensor parallel over 2 ranks: " in lines
    assert "pipeline stages 2, the fullest: " in lines


def test_info_tells_what_a_split_holds_out(capsys):
    status, out, _ = command("info split=parse_pbmc_fewshot", capsys)
    assert status == 0
    assert "contexts are          values of batch" in out
    assert "Donor12               4 labels are val, 62 are test" in out


def test_info_compares_a_split_with_a_store(capsys, toy_store_path, tmp_path):
    split = tmp_path / "split.toml"
    split.write_text(
        '[datasets]\na = "."\n[training]\na = "train"\n'
        """[fewshot."a.K562"]\nval = ["[('drugC', 0.5, 'uM')]"]\n"""
        """test = ["[('drugD', 0.05, 'uM')]", "drugX"]\n"""
        """[fewshot."a.K652"]\ntest = ["[('drugD', 0.05, 'uM')]"]\n"""
    )
    status, out, err = command(f"info store={toy_store_path} split={split}", capsys)
    assert (status, err) == (0, "")
    with CellSetStore.open(toy_store_path) as store:
        table, perturbations = store.conditions, store.perturbations
    names = np.array([perturbations[n].components[0].name for n in table["perturbation"]])
    for part, name in (("val", "drugC"), ("test", "drugD")):
        here = (table["cell_type"] == "K562").to_numpy() & (names == name)
        cells = table["num_cells"].to_numpy()[here].sum()
        assert f"  {part:<20}  {cells:,} cells of {here.sum()} treated conditions in 1 " in out
    assert "not in the data       2 names of the split" in out
    assert "cell_type 'K652' (did you mean 'K562'?)" in out
    assert "'drugX' in test of 'K562'" in out
    split.write_text(split.read_text().replace("drugC', 0.5", "drugD', 0.05"))
    status, out, err = command(f"info store={toy_store_path} split={split}", capsys)
    assert status == 1
    assert "are in val and in test" in err


@pytest.mark.parametrize(
    ("line", "choices"),
    [
        ("scale pre", sorted(SCHEMAS)),
        ("scale pretrain model=", [f"model={size}" for size in SIZES]),
        ("scale finetune trainer.max_", ["trainer.max_hours=", "trainer.max_steps="]),
    ],
)
def test_shell_completion_knows_tasks_and_their_settings(line, choices, capsys, monkeypatch):
    monkeypatch.setenv("COMP_LINE", line)
    status, out, _ = command("-sc query=bash", capsys)
    assert status == 0
    assert sorted(out.split()) == choices


# --- ends ---------------------------------------------------------------------------------------


def fails(error):
    def call():
        raise error

    return call


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FileExistsError("runs/x exists; give another name="), "runs/x exists; give another name="),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "No space left on device: a/b"),
        (FileNotFoundError(2, "No such file or directory", "x.h5ad"), "No such file or directory"),
        (MemoryError("Unable to allocate 9 GiB"), "out of memory: Unable to allocate 9 GiB"),
        (FloatingPointError("non-finite loss at step 3"), "non-finite loss at step 3"),
    ],
)
def test_expected_errors_become_one_line(error, line, capsys, tmp_path):
    run_dir = tmp_path / "run"
    assert guard(fails(error), "pretrain", run_dir) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"scale pretrain: {line}")
    assert said.count("\n") == 1
    assert not run_dir.exists()


def test_errors_of_the_package_are_expected_and_those_of_libraries_keep_a_traceback(
    capsys, tmp_path, monkeypatch
):

    assert guard(lambda: CellSetStore.open("no/such"), "info", tmp_path / "run") == 1
    assert not (tmp_path / "run").exists()
    assert "no/such is no store" in capsys.readouterr().err

    assert guard(lambda: int("x"), "pretrain", tmp_path / "run") == 1
    said = capsys.readouterr().err
    assert "unexpected ValueError: invalid literal for int()" in said
    assert "Traceback" not in said
    assert f"(traceback in {tmp_path / 'run' / 'pretrain.log'})" in said
    assert "Traceback" in (tmp_path / "run" / "pretrain.log").read_text()

    monkeypatch.setenv("SCALE_DEBUG", "1")
    guard(fails(KeyError("x")), "pretrain", None)
    assert "Traceback" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        guard(fails(KeyboardInterrupt()), "pretrain", None)


def test_log_of_a_run_says_why_it_ended(capsys, tmp_path):
    def call():
        start_logging(tmp_path / "pretrain.log", World(0, 1, 0))
        raise OSError("disk gone")

    guard(call, "pretrain", tmp_path)
    start_logging(None, World(0, 1, 0))
    assert "ERROR disk gone" in (tmp_path / "pretrain.log").read_text()
    assert capsys.readouterr().err == "scale pretrain: disk gone\n"


def test_message_names_the_rank(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    guard(fails(OSError("broken")), "pretrain", None)
    assert capsys.readouterr().err == "scale pretrain: rank 3: broken\n"


def test_status_of_the_task_is_the_status_of_the_command(capsys):
    assert guard(lambda: EXIT_AGAIN, "pretrain", None) == 75
    assert "the same command goes on" in capsys.readouterr().err
    assert guard(lambda: 0, "pretrain", None) == 0


def test_status_is_told_to_a_launcher_that_does_not_hand_it_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SCALE_STATUS_FILE", str(tmp_path / "status"))
    assert main(["--version"]) == 0
    assert main(["pretrian"]) == 1
    assert (tmp_path / "status").read_text() == "0\n1\n"


def test_stop_signal_is_installed_before_torch_and_only_where_a_task_heeds_it():
    code = (
        "import signal, sys\n"
        "from scale.cli import main\n"
        "for task in ('predict', 'pretrain'):\n"
        "    main([task, '--cfg', 'job'])\n"
        "    print(task, signal.getsignal(signal.SIGUSR1) != signal.SIG_DFL, file=sys.stderr)\n"
        "print('torch' in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.split() == ["predict", "False", "pretrain", "True", "False"]


def test_interrupt_ends_with_130_and_one_line(tmp_path):
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*SCALE, "prepare", "source.num_cells=1000000"],
        stderr=subprocess.PIPE,
        env=environ,
        # whoever runs these tests in the background of a shell has it ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        # its record says that the task has begun; the simulation then takes half a minute
        while not (tmp_path / "runs" / "prepare-synthetic" / "run.json").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert err.decode().splitlines()[-1] == "scale prepare: interrupted"
    assert b"Traceback" not in err


def test_output_cut_by_a_pipe_is_no_error():
    code = (
        "import sys\n"
        "from scale.cli import guard\n"
        "sys.exit(guard(lambda: print('line\\n' * 100_000) or 0, 'info', None))\n"
    )
    pipe = f"{shlex.join([sys.executable, '-c', code])} | head -n 1"
    done = subprocess.run(pipe, shell=True, capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"line\n", b"")
