#!/usr/bin/env bash
# The tests that lean most on torch, against another torch or Python than the one of constraints.txt:
#
#     tests/release/with_torch.sh 2.6.0 python3.10          # the oldest that pyproject.toml allows
#     tests/release/with_torch.sh 2.13.0 python3.13 tests/test_contract.py
#
# Makes a virtual environment in results/venvs, once; on Linux the torch of the index is a CUDA build
# of about 5 GB with what it needs. Not run by `make test`. Long runs are left out, and before torch 2.9
# the tests of what that torch has not; with 2.6 two fail that matter: a look of "auto" has Dynamo give up
# a compiled teacher inside g (slower, and right), and `torch.compile(fullgraph=True)` refuses
# `functional.penalty_gradient`. Python 3.13.0 has torch warn of its guards, which the tests of
# torch.compile count: take a later 3.13.
set -euo pipefail
cd "$(dirname "$0")/../.."
torch="$1" python="${2:-python3}"
shift; shift || true
if [ "$#" -eq 0 ]; then
    set -- tests/test_contract.py tests/test_public_api.py tests/test_tensors.py \
        tests/optimizers/test_{step,bad_input,checkpoints,dtypes,lower_steps,micro_batches}.py \
        tests/optimizers/test_{minibatches,restart_lower,hypergradient_optimizer}.py \
        tests/curvature tests/hypergradients/test_functional.py tests/levels tests/undo \
        tests/newton/test_minimize.py tests/nn tests/penalties torch_penalty_bilevel
fi
case "$torch" in 2.6.*|2.7.*|2.8.*) set -- "$@" \
    --ignore=tests/levels/test_together.py --ignore=tests/levels/test_rule_options.py -k "not Muon" \
    --deselect=tests/curvature/test_compiled.py::test_a_look_leaves_a_compiled_teacher_compiled \
    --deselect=tests/curvature/test_compiled.py::test_inductor_replays_its_own_masks \
    --deselect=tests/penalties/test_penalty_gradient.py::test_compiles_into_one_graph \
    --deselect=tests/undo/test_scope.py::test_hooks_are_there_only_in_a_search \
    -W "ignore:The epoch parameter in:UserWarning" ;;
esac
venv="results/venvs/$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-torch-$torch"
if [ ! -e "$venv/.ready" ]; then
    "$python" -m venv "$venv"
    # What the tests import and no more: scipy and numpy come in the newest that this Python has.
    "$venv/bin/pip" install --quiet --no-cache-dir "torch==$torch" \
        pytest hypothesis scipy numpy pytest-benchmark pytest-cov
    touch "$venv/.ready"
fi
"$venv/bin/python" -c 'import platform, torch; print("Python", platform.python_version(), "torch", torch.__version__)'
OMP_NUM_THREADS=1 exec "$venv/bin/python" -m pytest -q -p no:cacheprovider -m "not long" "$@"
