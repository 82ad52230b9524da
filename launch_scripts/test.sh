#!/usr/bin/env bash
# Set up from nothing and run everything CI runs: lint, format, types, import contracts, the CPU test suite.
#
#   launch_scripts/test.sh [PYTEST ARGUMENTS]     e.g. launch_scripts/test.sh -m "not slow"
#   MAX_JOBS=2                                    compilers at once (default: number of CPUs)
set -uo pipefail
cd "$(dirname "$0")/.."

export MAX_JOBS="${MAX_JOBS:-$(getconf _NPROCESSORS_ONLN)}"
export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
venv="${VENV:-.venv}"
failed=()
timings=()

stage() {
    local name="$1" start=$SECONDS
    shift
    echo "== $name"
    if ! "$@"; then
        failed+=("$name")
    fi
    timings+=("$(printf '%6d s  %s' $((SECONDS - start)) "$name")")
}

stage "setup" launch_scripts/setup.sh --dev
if [ ${#failed[@]} -gt 0 ]; then exit 1; fi
bin="$(cd "$venv/bin" && pwd)"
export PATH="$bin:$PATH"

stage "ruff check" ruff check .
stage "ruff format" ruff format --check .
stage "mypy" mypy
stage "import contracts" lint-imports
stage "pytest" python -m pytest "$@"

echo "== timings"
printf '%s\n' "${timings[@]}"
if [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED: ${failed[*]}" >&2
    exit 1
fi
