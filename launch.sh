#!/usr/bin/env bash
# Several GPUs, or several CPU processes:  ./launch.sh DEVICES [RUN] [SHARDING] [key=value ...]
#   SHARDING   ddp | zero1 | zero2 | zero3 | offload | fsdp   (zero3 on GPUs, ddp on the CPU; see accelerate_configs/)
#   restarts=N: after a crash the ranks start again from the newest checkpoint, N times.
#   Several machines: the same command on each, with NNODES, NODE_RANK (0, 1, ...) and MASTER_ADDR (of node 0) set;
#   NNODES=MIN:MAX goes on with the machines that are left.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
[ $# -ge 1 ] || { echo "usage: ./launch.sh DEVICES [RUN] [SHARDING] [key=value ...]" >&2; exit 2; }
trap "exit 75" TERM  # stopped before anything began: the same command begins it
./setup.sh

export TOKENIZERS_PARALLELISM=false
export VLLM_LOGGING_LEVEL="${VLLM_LOGGING_LEVEL:-ERROR}" VLLM_NO_USAGE_STATS=1
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"
exec .venv/bin/python launch.py "$@"
