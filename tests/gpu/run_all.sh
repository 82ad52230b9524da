#!/usr/bin/env bash
# Everything that needs a GPU, in one go: build, tests, compute-sanitizer, benchmarks. Run it from the repository root.
# What it writes goes to $OUT (default: a folder gpu_check): tests.xml, sanitizer-TOOL.txt, kernels.json, step-*.json,
# summary.json. step-9b-24gib: the 9B preset with all but the activations on the host, within 24 GiB of the device.
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


measure() {  # NAME SIZE ARGUMENTS...: whole updates of a paper's model with random weights
  local name=$1 size=$2
  shift 2
  step "step-$name" "$python" -m trainer.benchmark step "configs/benchmark/$size.yaml" \
    --steps 5 --warmup 2 --json "$out/step-$name.json" "$@"
}

on_host=(--deepspeed.offload_param.device cpu --deepspeed.offload_optimizer.device cpu)
small=(--data.sources.0.micro_batch_size 1 --data.sources.1.micro_batch_size 4)
measure 3b 3b
measure 3b-offloaded 3b "${on_host[@]}"
measure 9b 9b
measure 9b-offloaded 9b "${on_host[@]}"
measure 9b-24gib 9b --device-memory-gib 24 --training.activation_checkpointing true "${on_host[@]}" "${small[@]}"

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
