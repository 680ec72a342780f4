#!/usr/bin/env bash
# Makes .venv from requirements.txt (a GPU is visible) or requirements-cpu.txt; does nothing when it is up to date.
#   ./setup.sh                        what every command needs: the group base
#   ./setup.sh test data              these groups too (requirements.in lists them); all: every group
#   PYTHON=python3.12 ./setup.sh      another interpreter (3.11 or newer), kept until another is named
#   SETUP_DEVICE=cpu|gpu ./setup.sh   another list than that of the .venv which is there, or than the machine suggests
#   TORCH_INDEX_URL=... ./setup.sh    PyTorch from this index, where neither its own nor pip's settings give the right one
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

stamp=.venv/.setup-complete  # written last: without it a set-up was cut off, and .venv cannot be trusted
log=.venv/setup.log
made() { sed -n "$1p" "$stamp" 2>/dev/null || true; }
earlier="$(sed -n 's/^executable = //p' .venv/pyvenv.cfg 2>/dev/null || true)"
[ -x "$earlier" ] || earlier=python3
python="${PYTHON:-$earlier}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
  fail "$python is missing or older than Python 3.11: set PYTHON to a newer one"
seen() { timeout 30 nvidia-smi -L 2>/dev/null | grep -q '^GPU' && echo gpu || echo cpu; }
# What is there is kept: a login node without a GPU may share the folder with machines that have one.
made_for="$(made 1 | sed -n 's/^[^ ]* \(cpu\|gpu\) .*/\1/p')"
device="${SETUP_DEVICE:-${made_for:-$(seen)}}"
case "$device" in
  cpu) list=requirements-cpu.txt ;;
  gpu) list=requirements.txt ;;
  *) fail "SETUP_DEVICE=$device: use cpu or gpu" ;;
esac

known="$(sed -n 's/^# group: //p' "$list" | xargs)"
[ "$*" != all ] || set -- $known
for group in "$@"; do
  [[ " $known " == *" $group "* ]] || fail "there is no group $group: use all, or some of $known"
done
asked=(base "$@")

kind="$device $("$python" -V)"
wanted="$({ cat "$list" setup.sh pyproject.toml 2>/dev/null || true; pwd; } | sha256sum | cut -d' ' -f1) $kind"
up_to_date() {
  groups="$(made 2)"  # those that are there stay
  for group in "${asked[@]}"; do
    [[ " $groups " == *" $group "* ]] || groups="${groups:+$groups }$group"
  done
  [ -x .venv/bin/python ] && [ "$(made 1)" = "$wanted" ] && [ "$(made 2)" = "$groups" ]
}
if up_to_date; then
  [ "$device" = gpu ] || [ -n "${SETUP_DEVICE:-}" ] || [ "$(seen)" = cpu ] ||
    say ".venv is for a CPU, and a GPU is visible: SETUP_DEVICE=gpu ./setup.sh makes one for it"
  exit 0
fi

# What this shell waits for does not outlive it: it would hold the lock, and go on writing to .venv.
end() { trap "" INT TERM; kill $(jobs -p) 2>/dev/null || true; wait; exit "$1"; }
trap "end 130" INT
trap "end 143" TERM
await() { "$@" & wait $!; }  # where a trap runs at once; else it would when the command is done
exec 9>.venv.lock
flock -n 9 || say "another setup.sh is at work: waiting for it"
await flock -w 1800 9 || fail "another setup.sh has held .venv.lock for 30 minutes"
up_to_date && exit 0

export UV_COMPILE_BYTECODE=1  # as pip does: else the first run compiles, and repeats old packages' warnings
within() { await timeout "$@" 2>>"$log"; }  # SECONDS COMMAND: what it complains of goes to the log
pip() { within "$1" .venv/bin/python -m pip --disable-pip-version-check -q "${@:2}"; }
uv() { within "$1" .venv/bin/uv pip "$2" --python .venv/bin/python -q "${@:3}"; }
# uv asks the public index; where that does not answer, pip asks what this machine's settings name.
install() { uv "$1" install "${@:2}" || pip "$1" install "${@:2}"; }
packages() { awk -v groups=" $groups " '/^# group: / { on = index(groups, " " $3 " ") } on && /^[^#]/' "$list"; }
pinned() { grep -E "^$1==" "$list"; }
torch_build() {  # cpu or gpu, when the pinned version is there
  .venv/bin/python - "$(pinned torch)" <<'PYTHON' 2>/dev/null
import runpy, sys, sysconfig
torch = runpy.run_path(sysconfig.get_path("platlib") + "/torch/version.py")
if sys.argv[1] == "torch==" + torch["__version__"].partition("+")[0]:
    print("gpu" if torch["cuda"] else "cpu")
PYTHON
}

# An older list of the same kind is brought up to date in place. Anything else is made anew: installers believe the
# metadata of a package whose files were only half written.
if [[ "$(made 1)" == *" $kind" ]] && .venv/bin/python -m pip --version >/dev/null 2>&1; then
  rm -f "$stamp"
else
  say "making .venv"
  rm -rf .venv
  "$python" -m venv .venv || fail "$python cannot make a virtual environment (is its venv module installed?)"
fi
: >"$log"
pip 300 --retries 2 --timeout 30 install "$(pinned pip)" "$(pinned uv)" ||
  fail "no package index answers: check the network, then run again (pip's words are in $log)"

if [ "$(torch_build)" != "$device" ]; then
  say "installing PyTorch"
  torch="$(pinned torch)"
  backend=""  # of PyTorch's own index; a node without a GPU cannot say which CUDA another one has
  [ "$device" = gpu ] || backend=cpu
  [ "$device" = cpu ] || [ "$(seen)" = cpu ] || backend=auto
  elsewhere="set TORCH_INDEX_URL to an index with PyTorch's $device build (pytorch.org, 'Get Started', names it)"
  if [ -z "${TORCH_INDEX_URL:-}" ] && [ -n "$backend" ] &&
    UV_HTTP_RETRIES=1 uv 60 install --dry-run --no-deps --torch-backend="$backend" "$torch"; then
    uv 3600 install --no-deps --torch-backend="$backend" "$torch" ||
      fail "PyTorch could not be installed from its own index: run again, or $elsewhere (uv's words are in $log)"
  else
    index=(${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"})
    # fast-deps reads a wheel's metadata without the wheel.
    offered="$(pip 180 --retries 2 --use-feature=fast-deps install --dry-run --no-deps "${index[@]}" --report - "$torch" |
      .venv/bin/python -c '
import json, sys
wheel = json.load(sys.stdin)["install"][0]["metadata"]
version, needs = wheel["version"], " ".join(wheel.get("requires_dist", []))
print("cpu" if version.endswith("+cpu") or not ("+" in version or "nvidia-" in needs) else "gpu")' 2>>"$log")" ||
      fail "no index that answers has $torch: check the network, or $elsewhere (pip's words are in $log)"
    [ "$offered" = "$device" ] ||
      fail "PyTorch's own index does not answer, and pip would bring a $offered build where a $device build is needed:" \
        "$elsewhere"
    pip 3600 install --no-deps "${index[@]}" "$torch" ||
      fail "PyTorch could not be installed: run again, or $elsewhere (pip's words are in $log)"
  fi
  built_for="$(torch_build)"
  [ "$built_for" = "$device" ] ||
    fail "a ${built_for:-broken} build of PyTorch came where a $device build is needed: $elsewhere, and run again"
fi

say "installing the packages of $list: $groups (a few minutes)"
packages | grep -vE '^(torch|deepspeed)==' >.venv/requirements.txt
install 3600 --no-deps -r .venv/requirements.txt ||
  fail "the packages of $list could not be installed: check the network, then run again (the log: $log)"
# Built against the PyTorch that is there, without its operators, which compile when they are first used.
export DS_BUILD_OPS=0
install 900 --no-deps --no-build-isolation "$(pinned deepspeed)" ||
  fail "deepspeed could not be built (the log: $log)"
if grep -q '^\[project\]' pyproject.toml 2>/dev/null; then
  install 300 --no-deps --no-build-isolation -e . || fail "the project itself could not be installed (the log: $log)"
fi
printf '%s\n%s\n' "$wanted" "$groups" >"$stamp.new"
mv "$stamp.new" "$stamp"
say "done"
