#!/usr/bin/env bash
# Make .venv with the pinned dependencies and this project. A second call installs only what changed.
#
#   launch_scripts/setup.sh [--dev]      --dev also installs the tests' and linters' packages
#   PYTHON=/path/to/python               interpreter of the environment (3.11 or newer)
#   VENV=/path/to/folder                 folder of the environment (default: .venv in the clone)
set -euo pipefail
cd "$(dirname "$0")/.."

requirements=requirements.txt
case "${1:-}" in
    "") ;;
    --dev) requirements=requirements-dev.txt ;;
    *) echo "usage: $0 [--dev]" >&2; exit 2 ;;
esac
venv="${VENV:-.venv}"
log="$venv/setup.log"

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3.14 python3 python; do
        if command -v "$candidate" >/dev/null && is_new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
        if [ -n "${PYTHON:-}" ]; then break; fi # the user chose it, so no other is tried
    done
    echo "setup: found no Python 3.11 or newer (${PYTHON:+PYTHON=$PYTHON; }python3 is" \
        "$(python3 --version 2>&1 || echo missing)). Install it, or set PYTHON=/path/to/python3.11" >&2
    return 1
}

make_venv() {
    local python
    python="$(find_python)"
    if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
        echo "setup: $python has no venv module. On Debian and Ubuntu run: apt install python3-venv" >&2
        exit 1
    fi
    echo "setup: making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
}

# Writes all of pip's output to the log, and shows the lines about packages that take long.
install() {
    if ! "$venv/bin/python" -m pip install "$@" 2>&1 | tee -a "$log" |
        { grep --line-buffered -E '^ *(Downloading|Building|Installing)' | cut -c 1-100 || true; }; then
        tail -n 40 "$log" >&2
        echo "setup: failed: pip install $* (full output: $log)" >&2
        exit 1
    fi
}

# Prints a hash of the names and contents of files and of the interpreter's version.
fingerprint() {
    { printf '%s\n' "$@"; cat "$@"; } | "$venv/bin/python" -c \
        'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read() + sys.version.encode()).hexdigest())'
}

is_unchanged() { [ -f "$venv/$1" ] && [ "$(cat "$venv/$1")" = "$2" ]; }

if ! { [ -x "$venv/bin/python" ] && is_new_enough "$venv/bin/python"; }; then make_venv; fi

# The stamps are written last, so an interrupted setup is repeated.
stamp=".stamp-$requirements"
now="$(fingerprint requirements*.txt)"
# --dev installs everything that the call without it does.
if ! { is_unchanged "$stamp" "$now" || is_unchanged .stamp-requirements-dev.txt "$now"; }; then
    echo "setup: installing $requirements (several GB with torch; takes some minutes)"
    install -r "$requirements"
    echo "$now" >"$venv/$stamp"
fi

# Build isolation is off, because csrc must be compiled against the torch of this environment.
sources=(pyproject.toml)
[ -f setup.py ] && sources+=(setup.py)
while IFS= read -r file; do sources+=("$file"); done < <(find csrc -type f 2>/dev/null | sort)
now="$(fingerprint "${sources[@]}")-$(pwd | cksum)"
if ! is_unchanged .stamp-project "$now"; then
    echo "setup: installing the project"
    install --no-build-isolation --no-deps -e .
    echo "$now" >"$venv/.stamp-project"
fi
echo "setup: $venv is ready"
