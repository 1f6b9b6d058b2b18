# Backforward: `make help` lists the commands.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
VENV   ?= .venv
PY     := $(VENV)/bin/python
PORT   ?= 6006

ifneq ($(words $(VENV)),1)
$(error VENV=$(VENV): give the path of one folder, without spaces)
endif
# Removes the environment, but never another folder: a virtual environment contains pyvenv.cfg or our stamp.
define remove_venv
if [ -n "$$(ls -A "$(VENV)" 2>/dev/null)" ] && [ ! -e "$(VENV)/pyvenv.cfg" ] && [ ! -e "$(VENV)/.core" ]; then \
	echo "error: $(VENV) is no virtual environment and was left alone; give another folder: make VENV=..." >&2; exit 2; \
fi; rm -rf -- "$(VENV)"
endef

.PHONY: help setup quickstart reproduce test test-all check torture faults bench zoo gpu-check tensorboard clean

help: ## List these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  \033[1mmake %-12s\033[0m %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.core ## Create .venv and install the dependencies (the other commands do this themselves)

quickstart: $(VENV)/.core ## Sweep Backforward and SGD over learning rates on small digits; print a table (3 minutes at most)
	@$(PY) src/train.py -m experiment=quickstart
	@$(PY) src/report.py table outputs/quickstart
	@echo "Curves: make tensorboard, then open http://localhost:$(PORT)"

reproduce: $(VENV)/.core ## Judge both papers' claims: outputs/report (SCALE=smoke|small|medium|paper ONLY=names STAND_IN=1 FROM=outputs/reference)
	@$(PY) src/reproduce.py $(if $(SCALE),--scale $(SCALE)) $(if $(ONLY),--only $(ONLY)) $(if $(STAND_IN),--stand-in) $(if $(FROM),--go-on-from $(FROM)) $(OVERRIDES)

test: $(VENV)/.dev ## Run the tests, except slow ones and those that need Slurm or Ray
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m "not slow and not cluster"

test-all: $(VENV)/.dev ## Run all tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

check: $(VENV)/.dev ## Check lint, format, types and the direction of imports
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy src
	$(VENV)/bin/lint-imports

torture: $(VENV)/.dev ## Kill a sweep on MNIST 40 times at random; compare bitwise with an undisturbed one (15 minutes)
	OMP_NUM_THREADS=1 PYTHONPATH=src $(PY) -m tests.helpers.torture --kills 40 --epochs 16

faults: $(VENV)/.dev ## Inject faults: kills, torn writes, full disks, damaged files; see docs/faults.md (half an hour; STRIDE=5)
	OMP_NUM_THREADS=1 PYTHONPATH=src $(PY) -m tests.helpers.faults $(if $(STRIDE),--stride $(STRIDE))

docs: $(VENV)/.docs ## Build the documentation: outputs/site/index.html
	$(PY) docs/make_configuration.py
	$(PY) -m mkdocs build --strict

bench: $(VENV)/.core ## Measure speed: medians and ratios in one run (half an hour, on a quiet machine)
	$(PY) src/bench.py

zoo: $(VENV)/.zoo ## Compare engines on third-party networks and optimizers: docs/zoo.md (an hour; resumes; ONLY=word TIMES=1)
	OMP_NUM_THREADS=1 PYTHONPATH=src $(PY) -m tests.zoo $(if $(ONLY),--only $(ONLY)) $(if $(TIMES),--times)

gpu-check: ## Check and measure on a GPU: outputs/gpu_check.json (8 minutes; installs nothing; DRY_RUN=1 on a CPU, ONLY=parts)
	@$(or $(wildcard $(PY)),$(if $(filter file,$(origin PYTHON)),$(shell command -v python)),$(PYTHON)) src/gpu_check.py $(if $(DRY_RUN),--dry-run) $(if $(ONLY),--only $(ONLY))

tensorboard: $(VENV)/.core ## Serve the curves in outputs/ on http://localhost:6006 (PORT=...)
	$(VENV)/bin/tensorboard --logdir outputs --port $(PORT)

clean: ## Remove the environment and caches; outputs/ stays
	@$(remove_venv)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis src/*.egg-info
	find src tests -name __pycache__ -prune -exec rm -rf {} +

# If a stamp is older than its prerequisites, install again. An environment that is broken, or was moved or copied, is
# created again: its scripts, and its link to this source, still point to the old place.
HERE := $(abspath $(VENV))
ifneq ($(shell cat "$(VENV)/.core" 2>/dev/null),$(HERE))
.PHONY: $(VENV)/.core
endif
$(VENV)/.core: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	@[ ! -e $@ ] || [ "$$(cat $@)" = "$(HERE)" ] || { echo "$(VENV) was created elsewhere; creating it again"; $(remove_venv); }
	@$(PY) -c '' 2>/dev/null || { $(remove_venv); $(PYTHON) -m venv "$(VENV)"; }
	@echo "Installing into $(VENV) (once, about a minute) ..."
	@$(PY) -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[suite]'
	@echo "$(HERE)" > $@

$(VENV)/.dev: $(VENV)/.core
	@echo "Installing the test tools ..."
	@$(PY) -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.zoo: $(VENV)/.dev
	@echo "Installing the zoo's packages ..."
	@$(PY) -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev,zoo]'
	@touch $@

$(VENV)/.docs: $(VENV)/.core
	@echo "Installing the documentation tools ..."
	@$(PY) -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[docs]'
	@touch $@
