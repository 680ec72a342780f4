#!/usr/bin/env bash
# What a GPU does differently, checked and timed in under nine minutes:  scripts/gpu_check.sh OUT [--device cpu]
# Takes .venv where it is, else python3; RLT_PYTHON names another. See benchmarks/gpu_check/__main__.py.
set -euo pipefail
out=$(realpath -m "${1:?usage: scripts/gpu_check.sh OUT [--device cpu] [--parts NAME ...]}")
shift
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "${RLT_PYTHON:-$python}" -m benchmarks.gpu_check "$out" "$@"
