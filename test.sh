#!/usr/bin/env bash
# Lint, types and tests, from a bare checkout. Arguments go to pytest: ./test.sh tests/batches/test_forest.py
set -euo pipefail
root=$(cd "$(dirname "$0")" && pwd)
source "$root/setup.sh"
install "$root/requirements-dev.txt"
cd "$root"
# Two OpenMP threads that spin for each other on a busy machine can be thirty times slower.
export OMP_WAIT_POLICY=passive
if [ $# -eq 0 ]; then
    step "Lint and types"
    ruff check .
    mypy
    mypy RWKV-v5/*.py
    mypy benchmarks/*.py
    # Its package has a program for x86-64 Linux.
    if command -v hadolint >/dev/null; then hadolint Dockerfile; fi
    step "Documentation"
    codespell README.md CONTRIBUTING.md docs RWKV-v5 tests benchmarks
    NO_MKDOCS_2_WARNING=1 mkdocs build --strict
    step "CUDA kernels"
    python tests/kernels/compile_cuda.py
    step "Tests"
    set -- --numprocesses logical --maxprocesses 4 --dist worksteal
fi
python -m pytest "$@"
