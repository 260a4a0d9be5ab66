# shellcheck shell=bash
# Make .venv and install the package; sourced by scripts/demo and scripts/test, never run.
# pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, pip.conf) decide where packages come from.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
TORCH=${SCALE_TORCH:-torch==2.13.0} # as tested; a machine with its own build names it here
# Container images often forbid Python to keep what it compiled. Every process would then compile
# torch and Megatron anew: 18 CPU seconds where 7 are enough.
unset PYTHONDONTWRITEBYTECODE

say() { printf -- '--- %s\n' "$*"; }

find_python() { # prints the first Python of a version that the constraints are made for
    local name
    for name in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
        if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            printf '%s\n' "$name"
            return
        fi
    done
    echo "no Python 3.11 to 3.13 found; name one with PYTHON=/path/to/python" >&2
    return 1
}

torch_version() { # prints the version of a torch that is there and new enough
    "$venv/bin/python" -c '
from importlib.metadata import version
found = version("torch")
assert tuple(map(int, found.split(".")[:2])) >= (2, 6)
print(found)' 2>/dev/null
}

fingerprint() { # of all that an installation depends on
    cat "$root/pyproject.toml" "$root/constraints.txt" <(printf '%s' "$TORCH") | cksum
}

install() { # install [EXTRA]: .venv with torch, then this package with its dependencies
    local extra=${1:-} python found stamp started=$SECONDS
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    if [[ ! -x $venv/bin/python ]]; then
        python=$(find_python)
        say "making .venv with $("$python" --version)"
        "$python" -m venv "$venv"
    fi
    # unchanged: nothing to do, also without a network; what dev installs is more than the rest
    for stamp in "$venv/.installed-$extra" "$venv/.installed-dev"; do
        if [[ -f $stamp && $(<"$stamp") == "$(fingerprint)" ]]; then
            say "installed already"
            return
        fi
    done
    # --no-compile: Python compiles what is imported, not all of torch and scipy (46 s for 104 s)
    if found=$(torch_version); then
        say "torch $found is there"
    else
        say "installing $TORCH"
        "$venv/bin/python" -m pip install --quiet --no-compile -c "$root/constraints.txt" "$TORCH"
    fi
    say "installing the package and what it needs (a few minutes)"
    "$venv/bin/python" -m pip install --quiet --no-compile -c "$root/constraints.txt" -e "$root${extra:+[$extra]}"
    # compiles what every command imports: the first command then starts in 7 s, not in 19 s
    "$venv/bin/python" -c 'import scale.tasks.demo'
    fingerprint >"$venv/.installed-$extra"
    say "installed in $((SECONDS - started)) s"
}
