"""The shape of the tree: what may import what, what loads what, and what is in the wheel."""

import inspect
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import scale
from scale.cli import main

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "anndata", "megatron", "wandb", "matplotlib", "numba", "pandas", "scipy")


def in_a_new_process(code: str, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environ},
    )
    assert done.stderr == ""
    return done.stdout


# --- doors --------------------------------------------------------------------------------------


def test_import_rules_hold(tmp_path):
    pytest.importorskip("importlinter")
    lint = "import sys; from importlinter.cli import lint_imports_command as run; run()"
    done = subprocess.run(
        [sys.executable, "-c", lint, "--cache-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "statement",
    [
        "import scale; scale.__version__; scale.load; scale.evaluate",
        "import scale.types, scale.config, scale.runtime",
        "from scale.cli import main; main(['--help']); main(['pretrain', '--help'])",
        "from scale.cli import main; main(['pretrain', 'modle=base'])",
        "from scale.cli import main; main(['pretrain', 'model=base', '--cfg', 'job'])",
    ],
)
def test_nothing_heavy_is_loaded_for(statement):
    code = f"""
import contextlib, io, sys
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    {statement}
print(*sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    assert in_a_new_process(code).strip() == ""


@pytest.mark.parametrize(
    "order",
    [
        "import scale.evaluate.report; import scale",
        "import scale; from scale.evaluate import metrics; import scale.evaluate.report",
    ],
)
def test_evaluate_is_a_function_in_any_import_order(order):
    assert in_a_new_process(f"{order}\nprint(type(scale.evaluate).__name__)") == "function\n"


def test_public_names_are_there():
    from scale.evaluate import report
    from scale.predict import predictor

    for name in scale.__all__:
        assert getattr(scale, name)
    for wrapper, wrapped in ((scale.evaluate, report.evaluate), (scale.load, predictor.load)):
        assert inspect.signature(wrapper) == inspect.signature(wrapped)
    assert callable(scale.plot.delta)
    with pytest.raises(AttributeError, match="has no attribute 'predict_all'"):
        scale.predict_all  # noqa: B018


def test_open_store_opens(toy_store_path):
    with scale.open_store(toy_store_path, verify="full") as store:
        assert store.num_genes == 60


# --- the tree -----------------------------------------------------------------------------------


def test_no_file_of_the_package_is_ignored_by_git():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    files = [
        str(path.relative_to(ROOT))
        for folder in ("scale", "configs", "tests", "scripts", "docker")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    assert len(files) > 100
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", "--stdin"],
        cwd=ROOT,
        input="\n".join(files),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == ""


def test_test_files_have_names_of_their_own():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))


def test_scripts_can_be_run_and_say_how():
    scripts = [ROOT / "scripts" / name for name in ("check", "demo", "test")] + [ROOT / ".ci/run"]
    for script in scripts:
        assert os.access(script, os.X_OK)
        first, second = script.read_text().splitlines()[:2]
        assert first == "#!/usr/bin/env bash"
        assert second.startswith("# ")
    for script in [
        *scripts,
        ROOT / "scripts/environment.sh",
        ROOT / "scripts/slurm/pretrain.sbatch",
    ]:
        subprocess.run(["bash", "-n", script], check=True)


# --- the wheel ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An environment that holds the wheel, and this one's libraries behind it."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    wheel = next(folder.glob("*.whl"))
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--quiet", wheel],
        check=True,
    )
    site = next((folder / "venv" / "lib").glob("python*/site-packages"))
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (site / "libraries.pth").write_text("\n".join(libraries) + "\n")
    return folder / "venv" / "bin"


def test_wheel_works_from_another_directory(installed, tmp_path):
    def scale_(*arguments: str) -> str:
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "SCALE_"))}
        done = subprocess.run(
            [installed / "scale", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
            env=environ,
        )
        assert done.stderr == ""
        return done.stdout

    assert "usage: scale TASK" in scale_("--help")
    assert "hidden_size: 1024" in scale_("pretrain", "experiment=pretrain_tahoe", "--cfg", "job")
    place = scale_("info", "--info", "searchpath")
    assert str(installed.parent) in place
    assert str(ROOT) not in place


def test_wheel_holds_types_settings_and_licence(installed):
    site = next((installed.parent / "lib").glob("python*/site-packages"))
    for name in ("scale/py.typed", "scale/configs/pretrain.yaml", "scale/configs/log/none.yaml"):
        assert (site / name).is_file()
    assert any(site.glob("scale_virtual_cell-*.dist-info/licenses/LICENSE"))
    assert not (site / "tests").exists()


def test_main_module_is_guarded(capsys):
    import runpy

    before = sys.argv
    try:
        sys.argv = ["scale", "--version"]
        runpy.run_module("scale.__main__", run_name="__mp_main__")
        assert capsys.readouterr().out == ""
        with pytest.raises(SystemExit) as caught:
            runpy.run_module("scale", run_name="__main__")
        assert caught.value.code == 0
    finally:
        sys.argv = before
    assert main(["--version"]) == 0
