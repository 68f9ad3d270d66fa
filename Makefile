# Two commands do everything: `make demo` and `make test`. Both make their own environment in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Nothing here needs a model hub, and nothing may wait for one.
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-all check format clean

demo: $(INSTALLED)  ## train the quickstart model and let it answer (about ten minutes on two cores)
	$(BIN)/eve quickstart

# Two workers that both use all cores wait for each other in loops.
test test-all: export OMP_NUM_THREADS := 1

test: $(INSTALLED)  ## all tests but the slow ones
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: $(INSTALLED)  ## all tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --slow

check: $(INSTALLED)  ## formatter, linter, types
	$(BIN)/ruff format --check src tests
	$(BIN)/ruff check src tests
	$(BIN)/mypy

format: $(INSTALLED)  ## let the formatter and the linter mend what they can
	$(BIN)/ruff format src tests
	$(BIN)/ruff check --fix src tests

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	touch $@

clean:  ## remove the environment and what training left
	rm -rf $(VENV) runs
