#!/usr/bin/env bash
# All tests, after ruff and the type checker:  ./run_tests.sh        two at a time where there is no GPU
# Some:       ./run_tests.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
./setup.sh all
export TOKENIZERS_PARALLELISM=false VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL="${VLLM_LOGGING_LEVEL:-ERROR}" WANDB_MODE=offline
if [ $# -eq 0 ]; then
  .venv/bin/ruff check -q .
  .venv/bin/ruff format -q --check .
  .venv/bin/pyrefly check --summary=none
  # Slow tests, benchmarks and recipes are not run here: what they call takes their arguments, at least.
  calls=missing-argument,bad-keyword-argument,unexpected-keyword,missing-module-attribute,unknown-name
  paths=(--search-path . --search-path tests --search-path tests/chaos --search-path benchmarks --search-path recipes)
  readarray -t slow < <(grep -lr --include='*.py' 'mark\.slow' tests)
  .venv/bin/pyrefly check --summary=none --only "$calls" "${paths[@]}" "${slow[@]}" benchmarks/*.py recipes/*.py
fi
if [ $# -eq 0 ] && ! grep -q ' gpu ' .venv/.setup-complete; then
  # Most of the time goes to imports and to waiting for other processes, on one processor.
  export OMP_NUM_THREADS=1
  set -- -n 2 --dist worksteal
fi
exec .venv/bin/python -m pytest -q "$@"
