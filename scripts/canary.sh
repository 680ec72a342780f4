#!/usr/bin/env bash
# What the newest TRL and vLLM within the ranges of requirements.in break, one version at a time:
#   scripts/canary.sh OUT [--folder FOLDER] [LIBRARY ...]
# OUT/results.json and a table say it; the exit code is 1 when something broke. See scripts/canary.py.
set -euo pipefail
fail() { printf 'canary: %s\n' "$*" >&2; exit 1; }
[ $# -gt 0 ] || fail "usage: scripts/canary.sh OUT [--folder FOLDER] [LIBRARY ...]"
exec "${RLT_PYTHON:-python3}" "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/canary.py" "$@"
