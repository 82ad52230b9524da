#!/usr/bin/env bash
# Everything that needs a GPU, in one go: build, tests, compute-sanitizer, benchmark. Run it from the repository root.
# What it writes goes to $OUT (default: a folder gpu_check): tests.xml, sanitizer-TOOL.txt, kernels.json, summary.json.
# Exits with 0 when all of them pass. PYTHON chooses the interpreter; it needs the requirements installed.
set -uo pipefail

out=${OUT:-gpu_check}
python=${PYTHON:-python}
mkdir -p "$out"
declare -A status

step() {  # NAME COMMAND...: runs the command, keeps its exit status
  local name=$1
  shift
  echo "== $name: $*"
  "$@"
  status[$name]=$?
}

sanitize() {  # TOOL
  compute-sanitizer --tool "$1" --error-exitcode 1 "$python" -m tests.gpu.sanitize >"$out/sanitizer-$1.txt" 2>&1
}

step build "$python" setup.py build_ext --inplace
step tests "$python" -m pytest -m gpu tests/gpu -o addopts="" -q --junitxml="$out/tests.xml"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck synccheck initcheck; do step "$tool" sanitize "$tool"; done
else
  echo "compute-sanitizer is not installed: its checks did not run"
fi
step benchmark "$python" -m trainer.benchmark kernels --device cuda --json "$out/kernels.json"

failed=0
{
  printf '{'
  separator=''
  for name in "${!status[@]}"; do
    printf '%s"%s": %d' "$separator" "$name" "${status[$name]}"
    separator=', '
    [ "${status[$name]}" -eq 0 ] || failed=1
  done
  printf '}\n'
} >"$out/summary.json"
cat "$out/summary.json"
exit "$failed"
