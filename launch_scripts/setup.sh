#!/usr/bin/env bash
# Make .venv with the pinned dependencies and this project in it. Quick when nothing changed.
#
#   launch_scripts/setup.sh [--dev]      --dev adds what the tests and linters need
#   PYTHON=/path/to/python               which interpreter to make .venv with (3.11 or newer)
#   VENV=/path/to/folder                 where to make it (default: .venv in the clone)
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
        if [ -n "${PYTHON:-}" ]; then break; fi # somebody chose it: do not take another one
    done
    echo "setup: Python 3.11 or newer is needed and was not found (${PYTHON:+PYTHON=$PYTHON; }python3 is" \
        "$(python3 --version 2>&1 || echo missing)). Install it, or name it: PYTHON=/path/to/python3.11 $0" >&2
    return 1
}

make_venv() {
    local python
    python="$(find_python)"
    if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
        echo "setup: $python has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 1
    fi
    echo "setup: making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
}

# All of pip's output goes to the log; what takes long is shown.
install() {
    if ! "$venv/bin/python" -m pip install "$@" 2>&1 | tee -a "$log" |
        { grep --line-buffered -E '^ *(Downloading|Building|Installing)' | cut -c 1-100 || true; }; then
        tail -n 40 "$log" >&2
        echo "setup: failed: pip install $* (all of its output: $log)" >&2
        exit 1
    fi
}

# Of names and contents, and of the interpreter.
fingerprint() {
    { printf '%s\n' "$@"; cat "$@"; } | "$venv/bin/python" -c \
        'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read() + sys.version.encode()).hexdigest())'
}

done_before() { [ -f "$venv/$1" ] && [ "$(cat "$venv/$1")" = "$2" ]; }

if ! { [ -x "$venv/bin/python" ] && is_new_enough "$venv/bin/python"; }; then make_venv; fi

# The stamps are written last, so an interrupted setup is done again.
stamp=".stamp-$requirements"
now="$(fingerprint requirements*.txt)"
# What --dev installs holds everything else.
if ! { done_before "$stamp" "$now" || done_before .stamp-requirements-dev.txt "$now"; }; then
    echo "setup: installing $requirements (several GB with torch; some minutes)"
    install -r "$requirements"
    echo "$now" >"$venv/$stamp"
fi

# No build isolation: csrc is compiled against the torch in this environment.
sources=(pyproject.toml)
[ -f setup.py ] && sources+=(setup.py)
while IFS= read -r file; do sources+=("$file"); done < <(find csrc -type f 2>/dev/null | sort)
now="$(fingerprint "${sources[@]}")-$(pwd | cksum)"
if ! done_before .stamp-project "$now"; then
    echo "setup: installing the project"
    install --no-build-isolation --no-deps -e .
    echo "$now" >"$venv/.stamp-project"
fi
echo "setup: $venv is ready"
