#!/usr/bin/env bash
# All tests:  ./run_tests.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
./setup.sh
export TOKENIZERS_PARALLELISM=false VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL="${VLLM_LOGGING_LEVEL:-ERROR}" WANDB_MODE=offline
exec .venv/bin/python -m pytest -q "$@"
