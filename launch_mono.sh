#!/usr/bin/env bash
# One GPU or the CPU:  ./launch_mono.sh [RUN] [key=value ...]   (--help lists runs and keys)
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
trap "exit 75" TERM  # stopped before anything began: the same command begins it
./setup.sh
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE  # of a job's controller: here is one process

if [ -z "${CUDA_VISIBLE_DEVICES+set}" ] && timeout 30 nvidia-smi -L >/dev/null 2>&1; then
  export CUDA_VISIBLE_DEVICES=0
fi
export TOKENIZERS_PARALLELISM=false
export VLLM_LOGGING_LEVEL="${VLLM_LOGGING_LEVEL:-ERROR}" VLLM_NO_USAGE_STATS=1
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"
exec .venv/bin/python train.py "$@"
