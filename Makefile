# Every target sets itself up: a virtual environment in .venv with what it needs, made once.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(VENV)/bin/pip install --quiet --constraint constraints.txt

.PHONY: help demo test stress mutations lint suite rates profiles bench bench-report docs docs-links
.PHONY: docs-look docs-pictures notebooks migration dist release-check first-hour clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/'

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch goes first and alone, so that nothing that follows can choose another build of it.
$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	$(PIP) torch
	@touch $@

$(VENV)/.demo: pyproject.toml $(VENV)/.torch
	$(PIP) --editable '.[examples]' torchopt
	@touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.torch
	$(PIP) --editable '.[examples,test,trainers,bench,docs]'
	@touch $@

$(VENV)/.docs: pyproject.toml $(VENV)/.torch
	$(PIP) --editable '.[examples,docs]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.test
	$(PIP) --editable '.[dev]'
	@touch $@

demo: $(VENV)/.demo  ## clean mislabelled digits; table and picture in results/denoise
	$(RUN) -m examples.denoise --dataset digits

test: $(VENV)/.test  ## run the tests on all cores, with branch coverage
	$(RUN) -m pytest --numprocesses auto --dist worksteal --cov --cov-report=term --cov-fail-under=95

stress: $(VENV)/.test  ## long runs, phases, kinds of network and seeds, all of them; an hour or more
	STRESS=long $(RUN) -m pytest --numprocesses auto --dist worksteal tests/stress

mutations: $(VENV)/.test  ## break the code on purpose: does a test see it? report in results/
	$(RUN) tests/mutations/run.py --resume

lint: $(VENV)/.dev  ## lint, format check, strict types, form of the workflows
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(RUN)
	$(VENV)/bin/pyright --project tests/typing --pythonpath $(RUN)
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

suite: $(VENV)/.test  ## solve the analytic problems with minimize and the optimizer; tables
	$(RUN) -m benchmarks.suite.minimizer --starts 5
	$(RUN) -m benchmarks.suite.optimizer

rates: $(VENV)/.test  ## errors of the hypergradients under their bounds; table and benchmarks/rates/rates.png
	$(RUN) -m benchmarks.rates

profiles: $(VENV)/.test  ## share of problems solved against evaluations; tables and benchmarks/profiles/profiles.png
	$(RUN) -m benchmarks.profiles --picture benchmarks/profiles/profiles.png

bench: $(VENV)/.test  ## time, FLOPs and memory of one step against the peers, into results/speed.json
	@mkdir -p results
	$(RUN) -m pytest -c benchmarks/speed/pytest.ini benchmarks/speed --benchmark-json=results/speed.json

bench-report: $(VENV)/.test  ## tables and figure of benchmarks/speed/README.md from results/speed.json
	$(RUN) -m benchmarks.speed.report

dist: $(VENV)/.dev  ## wheel and sdist in dist/, looked at by twine and check-wheel-contents
	rm -rf dist
	$(RUN) -m build --outdir dist
	$(RUN) -m twine check --strict dist/*
	$(VENV)/bin/check-wheel-contents dist/*.whl

release-check: dist  ## the wheel alone in a new environment: README's blocks and examples run
	tests/release/check_release.sh dist

first-hour: dist  ## a stranger's path, timed: install, first run, own result, resume, plot, two processes
	tests/release/first_hour.sh dist

migration:  ## the pages of docs/migration against the libraries that they come from
	tests/release/migration.sh

docs: $(VENV)/.docs  ## build the documentation into docs/_build/html; a warning is an error
	$(RUN) -m sphinx -W --keep-going -n -q -b html docs docs/_build/html

docs-links: $(VENV)/.docs  ## ask every external link of the documentation; needs a network
	$(RUN) -m sphinx -W -q -b linkcheck docs docs/_build/links

docs-look: docs  ## every page in headless Chromium at two widths; screenshots in docs/_build/looks
	$(RUN) docs/check_pages.py --pictures docs/_build/looks

docs-pictures: $(VENV)/.docs  ## draw the pictures of docs/concepts anew
	$(RUN) -m docs.pictures

notebooks: $(VENV)/.docs  ## run docs/notebooks and keep their outputs
	$(RUN) docs/notebooks/run.py

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) dist docs/_build .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage
