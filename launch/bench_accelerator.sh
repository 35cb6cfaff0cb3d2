#!/usr/bin/env bash
# Runs launch/bench_accelerator.py by this project's environment or, where nothing was set up, by the machine's python3.
# RETOOL_PYTHON=/path/to/python3 names another.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${RETOOL_PYTHON:-}"
[ -n "$python" ] || { [ -x .venv/bin/python ] && python=.venv/bin/python; } || python=python3
exec "$python" launch/bench_accelerator.py "$@"
