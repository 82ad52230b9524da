#!/usr/bin/env bash
# Set up the environment and run all checks of CI: lint, format, types, import contracts, CPU tests.
#
#   launch_scripts/test.sh [PYTEST ARGUMENTS]     e.g. launch_scripts/test.sh -m "not slow"
#   MAX_JOBS=2                                    number of parallel compilers (default: number of CPUs)
#   SYSTEM_PACKAGES=1                             first install the packages for tests of several nodes (as root, with
#                                                 apt); without them these tests are skipped (default: 0; CI sets 1)
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

# Tries to install within a time limit; a failure only skips tests. No daemon starts now: the tests start them, on nodes
# made of namespaces.
system_packages() {
    local program missing=()
    for program in ip sshd pdsh mpirun munged slurmctld faketime; do
        PATH="$PATH:/usr/sbin" command -v "$program" >/dev/null || missing+=("$program")
    done
    if [ ${#missing[@]} -eq 0 ]; then return; fi
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
        echo "not root, or no apt-get: tests that need ${missing[*]} are skipped"
        return
    fi
    local install=(apt-get -qq install -y --no-install-recommends
        iproute2 openssh-server openssh-client pdsh openmpi-bin munge slurm-wlm faketime)
    if ! { timeout 60 apt-get -qq update && timeout 60 "${install[@]}" --download-only &&
        RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive timeout 90 "${install[@]}"; } </dev/null >/dev/null 2>&1; then
        echo "the installation failed: tests that need ${missing[*]} are skipped"
    fi
}

# Runs one part of the tests. It may have no test, because the arguments may select tests of the other part only.
selected=0
part() {
    local code=0
    python -m pytest --part "$@" || code=$?
    if [ "$code" -eq 5 ]; then return 0; fi
    selected=1
    return "$code"
}

# Side by side, with one thread each. Tests that start several processes would slow each other down.
one_process() { OMP_NUM_THREADS=1 part single --numprocesses auto --maxprocesses 8 --dist worksteal "$@"; }
several_processes() { part distributed "$@"; }

if [ "${SYSTEM_PACKAGES:-0}" = 1 ]; then stage "system packages" system_packages; fi
stage "setup" launch_scripts/setup.sh --dev
if [ ${#failed[@]} -gt 0 ]; then exit 1; fi
bin="$(cd "$venv/bin" && pwd)"
export PATH="$bin:$PATH"

stage "ruff check" ruff check .
stage "ruff format" ruff format --check .
stage "mypy" mypy
stage "import contracts" lint-imports
stage "pytest: one process" one_process "$@"
stage "pytest: several processes" several_processes "$@"
if [ "$selected" = 0 ]; then failed+=("pytest selected no test"); fi

echo "== timings"
printf '%s\n' "${timings[@]}"
if [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED: ${failed[*]}" >&2
    exit 1
fi
