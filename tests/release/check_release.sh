#!/usr/bin/env bash
# Does what would be uploaded work on a machine without this checkout?
#
#     tests/release/check_release.sh dist        # a folder with one wheel and one sdist
#
# In a temporary folder: the sdist is unpacked and its copy of the package removed, the wheel goes
# into a new environment, and there the first run, README's blocks and the examples' smallest forms
# run. torch is the one of constraints.txt. PYTHON chooses the interpreter.
set -euo pipefail
dist="$(cd "$1" && pwd)"
started=$SECONDS
say() { printf '%4d s  %s\n' "$((SECONDS - started))" "$*"; }

place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT
cd "$place"
tar -xzf "$dist"/*.tar.gz
mv torch_penalty_bilevel-* source
rm -r source/torch_penalty_bilevel
for file in Makefile constraints.txt pyproject.toml README.md CHANGELOG.md CONTRIBUTING.md LICENSE .ci/run docs; do
    [ -e "source/$file" ] || { echo "the sdist lacks $file" >&2; exit 1; }
done
# Every file that README links to.
grep -oE '\]\([^)#]+' source/README.md | cut -c3- | grep -v '^http' | sort -u | while read -r file; do
    [ -e "source/$file" ] || { echo "README.md links to $file, which the sdist lacks" >&2; exit 1; }
done

wheel=("$dist"/*.whl)
"${PYTHON:-python3}" -m venv clean
pip=(clean/bin/pip install --quiet --constraint source/constraints.txt)
"${pip[@]}" torch
"${pip[@]}" "${wheel[0]}"
say "installed"
python="$place/clean/bin/python"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" MPLBACKEND=Agg
version="$("$python" - <<'PY'
import importlib.metadata, pathlib, sys
import torch_penalty_bilevel as package

folder = pathlib.Path(package.__file__).parent
assert "site-packages" in str(folder), folder
assert (folder / "py.typed").exists()
metadata = importlib.metadata.metadata("torch_penalty_bilevel")
assert metadata["Version"] == package.__version__
links = [part for part in metadata.get_payload().split("](")[1:] if not part.startswith("http")]
assert not links, f"the index page would have broken links: {links[0][:60]}"
assert not {"numpy", "sklearn", "matplotlib"} & set(sys.modules)
print(package.__version__)
PY
)"
grep -q "^## \[$version\] - " source/CHANGELOG.md || { echo "CHANGELOG.md lacks $version" >&2; exit 1; }
say "version $version, metadata, changelog"
"$python" -m torch_penalty_bilevel --steps 20 | grep "points in ten clouds"
say "python -m torch_penalty_bilevel with torch alone"
(cd source && for name in penalty multiplier_rule engine; do "$python" -m "examples.extending.$name"; done)
say "examples/extending with torch alone"

"${pip[@]}" "${wheel[0]}[examples,test,bench]"
"$python" -m torch_penalty_bilevel --plot run.png | grep "this optimizer keeps"
[ -s run.png ]
say "python -m torch_penalty_bilevel --plot"
cd source
"$python" -m pytest -q -p no:cacheprovider README.md tests/commands/test_readme.py tests/commands/test_first_run.py
say "README's blocks"
"$python" -m pytest -q -p no:cacheprovider tests/commands/test_commands.py -k "guide or two_processes or help"
"$python" -m examples.synthetic --smoke --out "$place/synthetic" >"$place/log"
"$python" -m examples.denoise --dataset digits --smoke --out "$place/denoise" >>"$place/log"
say "examples' smoke runs"
