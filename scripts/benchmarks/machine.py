"""What figures were taken on and with, for the results of benchmarks."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("numpy", "numba", "torch", "h5py", "anndata", "pandas", "pyarrow", "zstandard")


def describe_machine() -> dict[str, Any]:
    """Return processor, cores, load, date, commit and versions."""
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    folder = str(Path(__file__).resolve().parent)
    commit = subprocess.run(
        ["git", "-C", folder, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip() or None,
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in (*_PACKAGES, "scale-virtual-cell")},
        },
    }
