#!/usr/bin/env bash
# All that there is to know of a GPU, in at most ten minutes, into one file: benchmarks/gpu_check.py says what. Arguments go to it.
#     ./benchmarks/gpu_check.sh              on a machine with a GPU, in an environment with requirements-dev.txt
#     ./benchmarks/gpu_check.sh --small      the same commands at tiny sizes on a CPU: whether they work
set -euo pipefail
exec "${PYTHON:-python}" "$(dirname "$0")/gpu_check.py" "$@"
