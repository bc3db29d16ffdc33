#!/usr/bin/env bash
# Lint, types and the whole test suite on all cores; further arguments go to pytest, such as --cov for the coverage, which
# makes the suite slower.
# Tests that need the image data sets find them through PISA_DATA and are skipped without it.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
prepare_environment "[dev]"

ruff check .
ruff format --check .
mypy
cores="$(python -c 'import os; print(min(os.cpu_count() or 1, 8))')"
python -m pytest -n "$cores" --dist loadgroup "$@"
