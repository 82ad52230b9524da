#!/usr/bin/env bash
# Run everything that needs a GPU, in two parts of at most nine minutes each. Run it from the repository root.
#
#   tests/gpu/run_all.sh 1    build, tests, compute-sanitizer, kernel benchmark, a ZeRO-3 step of a small model
#   tests/gpu/run_all.sh 2    steps of the 3B and 9B models, with and without offload (part 1 built the kernels)
#   tests/gpu/run_all.sh      both
#   OUT=gpu_check             folder for the results: tests.xml, sanitizer-TOOL.txt, kernels.json, step-*.json, and
#                             summary-PART.json with exit code and seconds of each command
#   PYTHON=python             interpreter with the requirements installed
#
# A command that takes too long is ended, and the next one starts. Exits with 0 when all commands of the part passed.
set -uo pipefail

out=${OUT:-gpu_check}
python=${PYTHON:-python}
mkdir -p "$out"
# Shapes change with every batch; without this the allocator's memory falls to pieces.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
names=()
declare -A status seconds

step() {  # NAME SECONDS COMMAND...: runs the command for so long at most; keeps its exit status and its duration
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    echo "== $name: $*"
    timeout --kill-after=10 "$limit" "$@"
    status[$name]=$?
    seconds[$name]=$((SECONDS - start))
    names+=("$name")
}

sanitize() {  # TOOL: torch's caching allocator would hide accesses beyond a tensor inside its blocks
    # shellcheck disable=SC2016
    step "$1" 50 bash -c '
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTORCH_CUDA_ALLOC_CONF= \
            compute-sanitizer --tool "$1" --error-exitcode 1 "$2" -m tests.gpu.sanitize >"$3" 2>&1
    ' _ "$1" "$python" "$out/sanitizer-$1.txt"
}

summarize() {  # PART: writes the summary, and returns 1 if a command of the part failed
    local name separator='' failed=0
    {
        printf '{'
        for name in "${names[@]}"; do
            printf '%s"%s": {"exit": %d, "seconds": %d}' "$separator" "$name" "${status[$name]}" "${seconds[$name]}"
            separator=', '
            [ "${status[$name]}" -eq 0 ] || failed=1
        done
        printf '}\n'
    } >"$out/summary-$1.json"
    cat "$out/summary-$1.json"
    names=()
    return "$failed"
}

measure() {  # NAME CONFIG SECONDS ARGUMENTS...: whole steps with random weights
    local name=$1 config=$2 limit=$3
    shift 3
    step "step-$name" "$limit" "$python" -m trainer.benchmark step "configs/benchmark/$config.yaml" \
        --steps 5 --warmup 2 --json "$out/step-$name.json" "$@"
}

part_1() {
    step build 120 "$python" setup.py build_ext --inplace
    step tests 100 "$python" -m pytest -m gpu tests/gpu -o addopts="" -q --junitxml="$out/tests.xml"
    measure small small 45
    step benchmark 75 "$python" -m trainer.benchmark kernels --device cuda --json "$out/kernels.json"
    if command -v compute-sanitizer >/dev/null; then
        local tool
        for tool in memcheck racecheck synccheck initcheck; do sanitize "$tool"; done
    else
        echo "compute-sanitizer is not installed: its checks did not run"
    fi
    summarize 1
}

part_2() {
    local on_host=(
        --deepspeed.offload_param.device cpu --deepspeed.offload_param.pin_memory true
        --deepspeed.offload_optimizer.device cpu --deepspeed.offload_optimizer.pin_memory true
    )
    local few_rows=(--data.sources.0.micro_batch_size 1 --data.sources.1.micro_batch_size 4)
    measure 3b 3b 90
    measure 3b-reference 3b 90 --training.ops reference
    measure 3b-offloaded 3b 90 "${on_host[@]}"
    measure 9b 9b 90
    measure 9b-offloaded 9b 90 "${on_host[@]}"
    measure 9b-24gib 9b 90 --device-memory-gib 24 --training.activation_checkpointing true "${on_host[@]}" "${few_rows[@]}"
    summarize 2
}

case ${1:-all} in
1) part_1 ;;
2) part_2 ;;
all)
    part_1
    first=$?
    part_2 && exit "$first"
    ;;
*)
    sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
