#!/usr/bin/env bash
# The pages of docs/migration against the libraries that they come from, which cannot stand beside each
# other in the environment of `make test`: BOAT asks for an old numpy, Betty for Python below 3.11,
# jax warns in every process that forks.
#
#     tests/release/migration.sh [pytest arguments]
#
# Makes an environment in results/venvs, once. What the pages need and pip has under that name is
# installed in the version that the page says; a page that is skipped says what it misses.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=results/venvs/migration
if [ ! -e "$venv/.ready" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
    pip=("$venv/bin/pip" install --quiet --no-cache-dir --constraint constraints.txt)
    "${pip[@]}" torch
    "${pip[@]}" . pytest pytest-benchmark hypothesis scipy matplotlib scikit-learn torchopt==0.7.3 higher==0.2.1 \
        jax==0.10.2 jaxopt==0.8.5
    "${pip[@]}" --no-deps boat-torch==1.1.1
    "${pip[@]}" --no-deps --ignore-requires-python betty-ml==0.2.1
    touch "$venv/.ready"
fi
OMP_NUM_THREADS=1 PYTHONPATH="$PWD" exec "$venv/bin/python" -m pytest -q -rs -p no:cacheprovider \
    tests/docs/test_pages.py -k migration "$@"
