#!/usr/bin/env bash
# The whole test suite, in its own environment: bash scripts/test.sh [pytest arguments]
set -euo pipefail
REQUIREMENTS=requirements-tests.txt source "$(dirname "$0")/env.sh"
ruff check .
[ $# -gt 0 ] || set -- --numprocesses auto --maxprocesses 8 --dist loadfile
exec python -m pytest "$@"
