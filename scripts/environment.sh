# Sourced by quickstart.sh and test.sh: a virtual environment in .venv with the tested versions.
# Variables: PYTHON (default python3) makes the environment, VENV (default .venv) is where it lies.

# Usage: prepare_environment EXTRAS   ("" or "[dev]")
prepare_environment() {
    local python="${PYTHON:-python3}" venv="${VENV:-.venv}" extras="$1"
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "error: Python >= 3.11 is needed, '$python' is $("$python" --version 2>&1 || echo missing); set PYTHON" >&2
        return 1
    fi
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    # Installed once per content of the files that decide what is installed.
    local stamp
    stamp="$venv/installed-$(cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)$extras"
    if [ ! -e "$stamp" ]; then
        echo "installing pisa_dist$extras into $venv (the first time takes a few minutes) ..."
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".$extras"
        touch "$stamp"
    fi
    PATH="$(cd "$venv/bin" && pwd):$PATH"
    # Several processes share the cores; more threads each would only make them wait for one another.
    export PATH OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
}
