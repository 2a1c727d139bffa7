# make train: set up and run the embedded default.
# make test: set up and run all checks.   make check: only quick tests, which start no processes.
# make test-slurm: tests on a local Slurm cluster (apt-get install slurm-wlm munge shellcheck; root).
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
VERSION = $(shell cat setup.py pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
# What training needs, and what the checks need beyond it.
NEW = $(VENV)/new-$(VERSION)
RUNS = $(VENV)/runs-$(VERSION)
READY = $(VENV)/ready-$(VERSION)
# Runs access no model hub. All files they need are in the repository and the installed packages.
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

# Without a GPU DeepSpeed would warn of its absence in each process.
ACCELERATOR = $(shell { command -v nvidia-smi || command -v rocm-smi; } >/dev/null || echo DS_ACCELERATOR=cpu)

.PHONY: train check test run-tests test-slurm setup lint
train: $(RUNS)
	PATH="$(abspath $(BIN)):$$PATH" $(ACCELERATOR) deepspeed --quiet mobius_train/main.py --deepspeed ds_configs/zero2.json

check: $(READY) lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not distributed and not slurm and not gpu"

test: lint run-tests

run-tests: $(READY)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-slurm: $(READY)
	$(BIN)/python -m pytest -q tests/slurm

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(READY)

$(READY): | $(NEW)
	$(call install,emoji,test)
	@touch $(RUNS) $@

$(RUNS): | $(NEW)
	$(call install,emoji)
	@touch $@

# An environment of another version is made anew.
$(NEW):
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 14) else f"Python 3.11 to 3.14 is needed, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=python3.12")'
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# pip would compile on one core.
comma = ,
define install
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[$(1)$(if $(2),$(comma)$(2))]'
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
endef
