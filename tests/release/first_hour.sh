#!/usr/bin/env bash
# A stranger's first hour, timed: install, a first run, an own result, a checkpoint resumed, a plot, two
# processes. What is typed is what README and documentation say; the source of the package is not there.
#
#     tests/release/first_hour.sh dist        # a folder with one wheel and one sdist
#
# In a temporary folder, with an environment of its own. PYTHON chooses the interpreter.
set -euo pipefail
dist="$(cd "$1" && pwd)"
started=$SECONDS
say() { printf '%4d s  %s\n' "$((SECONDS - started))" "$*"; }

place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT
cd "$place"
tar -xzf "$dist"/*.tar.gz --wildcards '*/docs/*' '*/README.md' '*/constraints.txt'
mv torch_penalty_bilevel-* site # what the documentation shows
wheel=("$dist"/*.whl)

"${PYTHON:-python3}" -m venv mine
mine/bin/pip install --quiet --constraint site/constraints.txt torch
mine/bin/pip install --quiet "${wheel[0]}[plot]" scikit-learn
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" MPLBACKEND=Agg
python="$place/mine/bin/python"
say "installed, with torch, scikit-learn and matplotlib"

"$python" -m torch_penalty_bilevel --plot first.png >log
grep -q "this optimizer keeps" log && [ -s first.png ]
say "python -m torch_penalty_bilevel --plot first.png:$(grep 'this optimizer keeps' log)"

# The blocks of a page, one after the other, as somebody who pastes them has them.
pasted() { awk '/^```python$/ {on = 1; next} /^```$/ {on = 0} on' "$1"; }

pasted site/README.md | sed '/^result = minimize/,$d' >readme.py
"$python" readme.py >log
grep -q "of the labels told right" log
say "the README's first example: $(tail -n 1 log)"

pasted site/docs/tutorial.md >tutorial.py
"$python" tutorial.py >log
grep -qx "True" log && [ -s half-way.pt ] && [ -s run.png ]
say "the tutorial: $(grep 'in hand' log); checkpoint resumed bit by bit; run.png"

cp site/docs/how-to/data_parallel.py .
for processes in 1 2; do
    mine/bin/torchrun --standalone --nproc-per-node "$processes" data_parallel.py >log 2>errors || { cat errors >&2; exit 1; }
    say "torchrun, DistributedDataParallel: $(cat log)"
done
