# Two commands matter: `make quickstart` and `make test`. Each makes its own virtual environment first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: quickstart test test-slow test-online lint reference benchmark clean

# Stamps, so that a second call does not install again; a changed pin does.
$(VENV)/.hf: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "neox needs Python 3.11 or newer; set PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[hf]"
	touch $@

$(VENV)/.dev: $(VENV)/.hf
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install -q --no-deps mup==1.0.0  # a test's peer; torchvision and seaborn are for its pictures
	touch $@

quickstart: $(VENV)/.hf
	$(BIN)/neox quickstart

# One worker a core, each with one thread: on models this small, threads wait for each other longer than they work.
# worksteal keeps the tests of a module together, so that its fixtures are made once or twice, not once a worker.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs
SHARED = -n auto --dist worksteal

test: $(VENV)/.dev lint
	$(PYTEST) $(SHARED)

# Tests that measure memory or start many processes of their own run after the others, one at a time.
test-slow: $(VENV)/.dev
	$(PYTEST) $(SHARED) -m "slow and not alone and not gpu and not online"
	$(PYTEST) -m "slow and alone and not gpu and not online"

# Reads real models from the Hugging Face hub: never part of CI.
test-online: $(VENV)/.dev
	$(BIN)/python -m pytest -m online

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The tables of options in the guides, from the options' descriptions.
reference: $(VENV)/.dev
	$(BIN)/python -m neox.cli.reference docs/*.md

benchmark: $(VENV)/.dev
	$(BIN)/python benchmarks/train_cpu.py

clean:
	rm -rf $(VENV) runs
