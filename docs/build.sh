#!/usr/bin/env bash
# API docs from the docstrings: bash docs/build.sh [FOLDER]   (default: site/)
set -euo pipefail
cd "$(dirname "$0")/.."
python -W error::UserWarning -m pdoc --docformat google --output-directory "${1:-site}" equimd
