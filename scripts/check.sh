#!/usr/bin/env bash
# Everything that must hold before a change lands: lint, types, tests, in a fresh virtual environment.
# Arguments go to pytest: `bash scripts/check.sh -m "not slow"`.
set -euo pipefail
cd "$(dirname "$0")/.."

# Memory in huge pages (jaxear/process_memory.py), but none kept: the tests have many programs.
export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}
export PYTHONDONTWRITEBYTECODE=  # the many programs that the tests start import in half the time
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
python3 -m venv "$environment"
PATH="$environment/bin:$PATH"
pip install --quiet --no-compile --constraint constraints.txt torch torchvision --editable '.[dev]'

ruff check .
ruff format --check .
pyright
pytest "$@"
