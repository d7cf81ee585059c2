# Everything a developer runs. `make help` lists it; PYTHON=... picks the interpreter for .venv.

VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python
PIP := $(RUN) -m pip install -qq --disable-pip-version-check
PYTEST := $(RUN) -m pytest -q
PARALLEL := -n auto --maxprocesses=4 --dist worksteal
THOROUGH := --hypothesis-profile=thorough
WITHOUT := --ignore=tests/release
WORLDS := 1000
TAG := $(shell git describe --exact-match --tags 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help demo test simulate test-matrix quality release-check bench bench-quick clean
.PHONY: check-source check-workflows check-versions check-tests distributions
.DELETE_ON_ERROR:
.NOTPARALLEL:

# Without bytecode every worker compiles the tests, and every process of a test the library.
unexport PYTHONDONTWRITEBYTECODE

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.package ## run the example application (docs/examples/first_run.py)
	@echo "== demo: docs/examples/first_run.py"
	@$(RUN) docs/examples/first_run.py

test: $(VENV)/.dev ## run the tests on the Python of .venv, in random order; not the slow ones
	@echo "== tests"
	@$(PYTEST) $(PARALLEL) $(WITHOUT) -m "not slow"

simulate: $(VENV)/.dev ## live through many random worlds (WORLDS=1000)
	@echo "== $(WORLDS) random worlds, twice"
	@$(PYTEST) $(PARALLEL) tests/simulation --worlds=$(WORLDS)

test-matrix: $(VENV)/.dev ## build the wheel once and test it on every supported Python found
	@echo "== tests of the wheel on every Python found"
	@$(RUN) tests/release/matrix.py

quality: check-source check-workflows check-versions check-tests distributions ## everything that is checked before a merge
	@echo "== all good"

release-check: quality ## the same, and that the tag of this commit (TAG=vX.Y.Z) names the version
	@echo "== release: tag $(or $(TAG),(none)), distributions"
	@$(RUN) tests/release/versions.py $(TAG)
	@cd dist && sha256sum *

check-source: $(VENV)/.dev
	@echo "== format"
	@$(RUN) -m ruff format --check .
	@echo "== lint"
	@$(RUN) -m ruff check .
	@echo "== types"
	@$(RUN) -m mypy

check-workflows: $(VENV)/.workflows
	@echo "== workflows"
	@$(BIN)/actionlint
	@$(BIN)/zizmor --offline --quiet --no-progress .github

check-versions: $(VENV)/.dev
	@echo "== version: pyproject.toml, coalestra.__version__, CHANGELOG.md"
	@$(RUN) tests/release/versions.py
	@echo "== contract of 0.6: capabilities and safety"
	@$(RUN) -I -W error tests/release/contract.py src
	@echo "== public names: the exact manifest"
	@$(RUN) tests/architecture/public_api.py

check-tests: $(VENV)/.dev
	@echo "== number of tests"
	@$(RUN) tests/release/counting.py 700
	@echo "== concurrency: interleavings that are forced, in fixed order"
	@$(PYTEST) -p no:randomly -m concurrency $(WITHOUT)
	@echo "== all tests, with the lines of the library they reach"
	@$(PYTEST) $(PARALLEL) $(WITHOUT) $(THOROUGH) --cov --cov-report=

distributions: $(VENV)/.dev ## build the wheel and the source distribution into dist/, and verify them
	@echo "== distributions, and the wheel alone in a clean environment"
	@rm -rf dist
	@$(RUN) -m build --outdir dist . >/dev/null
	@$(PYTEST) tests/release --distributions=dist

bench: $(VENV)/.bench ## measure the library, and others beside it
	@echo "== benchmarks"
	@$(RUN) -m tests.benchmarks
	@$(RUN) -m tests.benchmarks.shared

bench-quick: $(VENV)/.bench ## the same with few repetitions, to see that it works
	@echo "== benchmarks, quickly"
	@$(RUN) -m tests.benchmarks --quick
	@$(RUN) -m tests.benchmarks.shared --quick

.PHONY: docs
docs: $(VENV)/.docs ## build the documentation site into build/site, and run its recipes
	@echo "== documentation: build/site/index.html, and the recipes, each in its framework"
	@COALESTRA_SITE=build/site $(PYTEST) $(PARALLEL) tests/docs -k "recipe or site"

.PHONY: pictures
pictures: $(VENV)/.dev ## renew the pictures of the live page in docs/images
	@echo "== pictures, by $$(sh .ci/find-chromium)"
	@$(PYTEST) tests/inspect/test_browser.py -k pictures --pictures

clean: ## remove environments, caches and what was built
	@echo "== clean"
	@rm -rf $(VENV) .venvs build dist .coverage .coverage.* htmlcov
	@rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache src/*.egg-info
	@find src tests docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# The stamps below tell what .venv holds, so that the second run installs nothing.

$(VENV)/.made:
	@if $(RUN) -c 'import pip, sys; assert sys.version_info >= (3, 10)' 2>/dev/null; then \
		echo "== using the $(VENV) that is there"; \
	else \
		python=$$(sh .ci/find-python $(PYTHON)) && echo "== making $(VENV) with $$python" \
			&& "$$python" -m venv --clear $(VENV); \
	fi
	@touch $@

$(VENV)/.package: $(VENV)/.made pyproject.toml
	@echo "== installing coalestra into $(VENV)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.package
	@echo "== installing the development tools into $(VENV)"
	@$(PIP) -e '.[dev]'
	@touch $@

$(VENV)/.workflows: $(VENV)/.package
	@echo "== installing the checkers of workflows into $(VENV)"
	@$(PIP) -e '.[workflows]'
	@touch $@

$(VENV)/.bench: $(VENV)/.package
	@echo "== installing what the benchmarks compare with into $(VENV)"
	@$(PIP) -e '.[bench]'
	@touch $@

$(VENV)/.docs: $(VENV)/.dev
	@echo "== installing what builds the documentation into $(VENV)"
	@$(PIP) -e '.[docs]'
	@touch $@
