# `make train` and `make test` need nothing but Python 3.10+ and a network for the first install.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
WORKERS ?= auto

.PHONY: train test lint types docs claims clean
.DEFAULT_GOAL := train

# torch goes first: with it there, nothing that follows asks for another build of it.
$(VENV)/.core: pyproject.toml constraints.txt setup.py $(wildcard src/headway/kernels/native/*)
	@echo "installing headway into $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch==2.13.0
	@$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	@echo "installing what the tests and checks need"
	@$(PIP) -e '.[dev]'
	@touch $@

train: $(VENV)/.core
	$(BIN)/headway train $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.dev
	$(BIN)/mypy

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict --quiet

claims: $(VENV)/.dev
	$(BIN)/headway verify --all --collect docs/claims

clean:
	rm -rf $(VENV) build site
