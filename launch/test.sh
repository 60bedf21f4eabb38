#!/usr/bin/env bash
# Install what the tests need and run them; further words go to pytest, e.g. `bash launch/test.sh -m "not slow"`.
# VENV and PYTHON: see environment.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment test

cd "$root"
export OMP_NUM_THREADS=1
exec python -m pytest -n 2 --no-loadscope-reorder "$@"
