#!/usr/bin/env bash
# Build the documentation as a site of static pages. A dead link or anchor fails the build.
#
#   launch_scripts/docs.sh [FOLDER]     folder of the pages (default: build/docs); open FOLDER/index.html
#
# It needs the packages of launch_scripts/setup.sh --dev, and no network.
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in -*) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2; exit 2 ;; esac
python="${VENV:-.venv}/bin/python"
if ! "$python" -c 'import furo, myst_nb, sphinx' 2>/dev/null; then
    echo "docs: Sphinx is missing; run launch_scripts/setup.sh --dev" >&2
    exit 1
fi
output="${1:-build/docs}"
DS_ACCELERATOR=cpu "$python" -m sphinx --builder html --fail-on-warning --keep-going --nitpicky --quiet \
    --conf-dir docs . "$output"
echo "docs: $output/index.html"
