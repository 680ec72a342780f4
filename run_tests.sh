#!/usr/bin/env bash
# All tests, two files at a time:  ./run_tests.sh        Some, one after the other:  ./run_tests.sh PYTEST_ARGUMENTS
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
./setup.sh
export TOKENIZERS_PARALLELISM=false VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL="${VLLM_LOGGING_LEVEL:-ERROR}" WANDB_MODE=offline
[ $# -gt 0 ] || set -- -n 2 --dist loadfile
exec .venv/bin/python -m pytest -q "$@"
