# Everything a developer runs. `make help` lists it; PYTHON=... picks the interpreter for .venv.

VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python
PIP := $(RUN) -m pip install -qq --disable-pip-version-check
METADATA := pyproject.toml src/coalestra/_version.py
WITHOUT := --ignore=tests/release

.DEFAULT_GOAL := help
.PHONY: help demo test test-matrix quality bench bench-quick clean
.DELETE_ON_ERROR:

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.package ## run the example application (docs/examples/first_run.py)
	@echo "== demo: docs/examples/first_run.py"
	@$(RUN) docs/examples/first_run.py

test: $(VENV)/.dev ## run the tests on the Python of .venv, in random order
	@echo "== tests"
	@$(RUN) -m pytest -q $(WITHOUT)

test-matrix: $(VENV)/.dev ## build the wheel once and test it on every supported Python found
	@echo "== tests of the wheel on every Python found"
	@$(RUN) tests/release/matrix.py

quality: $(VENV)/.dev ## format, lint, types, architecture, tests, documents, wheel
	@echo "== format"
	@$(RUN) -m ruff format --check .
	@echo "== lint"
	@$(RUN) -m ruff check .
	@echo "== types"
	@$(RUN) -m mypy
	@echo "== architecture and public names"
	@$(RUN) -m pytest -q tests/architecture
	@echo "== documents"
	@$(RUN) -m pytest -q tests/docs
	@echo "== release: what is built, and what it says of itself"
	@$(RUN) -m pytest -q tests/release
	@echo "== tests of the wheel, alone in a clean environment"
	@$(RUN) tests/release/matrix.py --only-this
	@echo "== tests, with the lines of the library they reach"
	@$(RUN) -m coverage run -m pytest -q $(WITHOUT) --ignore=tests/architecture --ignore=tests/docs
	@$(RUN) -m coverage report --format=total | sed 's/.*/branch coverage: & %/'

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
	@echo "== documentation: the recipes, each in its framework"
	@$(RUN) -m pytest -q tests/docs -k "recipe or site"
	@echo "== documentation: build/site/index.html"
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet

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

$(VENV)/.package: $(VENV)/.made $(METADATA)
	@echo "== installing coalestra into $(VENV)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.package
	@echo "== installing the development tools into $(VENV)"
	@$(PIP) -e '.[dev]'
	@touch $@

$(VENV)/.bench: $(VENV)/.package
	@echo "== installing what the benchmarks compare with into $(VENV)"
	@$(PIP) -e '.[bench]'
	@touch $@

$(VENV)/.docs: $(VENV)/.dev
	@echo "== installing what builds the documentation into $(VENV)"
	@$(PIP) -e '.[docs]'
	@touch $@
