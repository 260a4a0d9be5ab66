"""Other programs of a benchmark, run to their end with one thread, and what they cost."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OFFLINE = {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
"""For arc-state, which would ask a network."""
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclass(frozen=True, slots=True)
class Cost:
    """What a command took, from its first import to its exit."""

    cpu: float
    """Seconds of the process and of the children it waited for."""
    wall: float


def run_command(
    command: list[str], log: Path, environment: Mapping[str, str] | None = None
) -> Cost:
    """Run a command, its words in ``log``; end with its last words if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    variables = {**os.environ, **ONE_THREAD, **(environment or {})}
    begin = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=variables)
        # Of this process alone: the usage of all children has that of others which end meanwhile.
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed; its last words:\n{log.read_text()[-2000:]}")
    return Cost(usage.ru_utime + usage.ru_stime, time.perf_counter() - begin)


def environment_python(package: str) -> str:
    """Return the python of another package's environment, which is made if it is not there."""
    script = ROOT / "scripts" / f"{package}_environment"
    made = subprocess.run([str(script)], capture_output=True, text=True)
    if made.returncode:
        sys.exit(f"no environment by scripts/{script.name}: {made.stderr[-500:]}")
    return made.stdout.strip()
