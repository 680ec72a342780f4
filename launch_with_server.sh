#!/usr/bin/env bash
# Generation on devices of its own:  ./launch_with_server.sh SERVER_DEVICES DEVICES [RUN] [SHARDING] [key=value ...]
#   The first number of devices is for vLLM servers (vllm_tensor_parallel_size each), the second trains (launch.sh).
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
[ $# -ge 2 ] || { echo "usage: ./launch_with_server.sh SERVER_DEVICES DEVICES [RUN] [SHARDING] [key=value ...]" >&2; exit 2; }
servers="$1"
shift
exec ./launch.sh "--servers=$servers" "$@"
