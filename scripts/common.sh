# Sourced by the other scripts: finds a Python, makes .venv and installs the package into it.
#
#   MHC_PYTHON=/path/to/python   use this interpreter as it is (a container with torch and Megatron): no
#                                venv, no installation
#   MHC_VENV=/path/to/venv       where to make the venv (default: .venv in the checkout)

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$ROOT/scripts/help.sh"

die() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}

step() { printf '\n==> %s\n' "$*"; }

# megatron-core 0.19 has wheels for 3.12 and 3.13.
python_fits() {
    "$1" -c 'import sys, venv; sys.exit(not (3, 12) <= sys.version_info < (3, 14))' >/dev/null 2>&1
}

# Print the path of the first Python 3.12 or 3.13 that has venv, or nothing.
find_python() {
    local candidate
    for candidate in \
        "$(command -v python3.12)" "$(command -v python3.13)" "$(command -v python3)" "$(command -v python)" \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python \
        "$HOME"/.local/share/uv/python/cpython-3.1[23]*/bin/python3 \
        "${CONDA_PREFIX:-/nonexistent}/bin/python"; do
        # A pyenv shim exists for every version but runs only the selected one: trying it tells.
        if [ -n "$candidate" ] && python_fits "$candidate"; then
            echo "$candidate"
            return
        fi
    done
}

# Set PYTHON to the interpreter to use, installing the package with the given extras where needed.
#   ensure_python train,dev
ensure_python() {
    local extras="$1" base stamp wanted
    if [ -n "${MHC_PYTHON:-}" ]; then
        PYTHON="$MHC_PYTHON"
        "$PYTHON" -c 'import megatron.core, torch' >/dev/null 2>&1 ||
            die "MHC_PYTHON=$MHC_PYTHON cannot import torch and megatron.core; unset it to install them into .venv"
        export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
        return
    fi
    local venv="${MHC_VENV:-$ROOT/.venv}"
    PYTHON="$venv/bin/python"
    if ! [ -x "$PYTHON" ]; then
        base="$(find_python)"
        [ -n "$base" ] || die "no Python 3.12 or 3.13 with venv found (megatron-core 0.19 needs one). Get it by
    pyenv install 3.12          or
    uv python install 3.12      or
    apt-get install python3.12 python3.12-venv
and run this script again."
        step "making $venv with $("$base" --version)"
        "$base" -m venv "$venv" || die "$base -m venv $venv failed"
    fi
    # Installed once for these dependencies: a change of pyproject.toml or of the constraints repeats it.
    stamp="$venv/.installed-${extras//,/-}"
    wanted="$(cat "$ROOT/pyproject.toml" "$ROOT/scripts/constraints.txt" | cksum)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        step "installing megatron-mhc[$extras] and its dependencies (several minutes, 5 GB, the first time)"
        "$PYTHON" -m pip install -qq --disable-pip-version-check \
            -c "$ROOT/scripts/constraints.txt" -e "$ROOT[$extras]" ||
            die "pip install failed; see its message above"
        echo "$wanted" >"$stamp"
    fi
}
