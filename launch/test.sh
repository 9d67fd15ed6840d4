#!/usr/bin/env bash
# Makes the environment and runs the test suite; what follows goes to pytest:
#
#   bash launch/test.sh                     everything
#   bash launch/test.sh tests/test_cli.py   one file
#   bash launch/test.sh -k naflex -n 0      by name, in one process
set -euo pipefail

case "${1:-}" in
  -h | --help)
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    exit 0
    ;;
esac

# shellcheck source=launch/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
glmv_environment dev
cd "$GLMV_REPO"

# Two worker processes, each with one thread for torch: tests are small, and eight emulated devices fill the cores.
# Each goes through files of its own, where tests share what is made for a file, until one has nothing left to do.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$GLMV_VENV/bin/python" -m pytest -n 2 --dist worksteal "$@"
