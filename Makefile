# Backforward: `make help` lists what there is.
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
# Removes the environment, and never a folder that is none: a venv holds pyvenv.cfg, one of ours a stamp as well.
define remove_venv
if [ -n "$$(ls -A "$(VENV)" 2>/dev/null)" ] && [ ! -e "$(VENV)/pyvenv.cfg" ] && [ ! -e "$(VENV)/.core" ]; then \
	echo "error: $(VENV) is no virtual environment, and stays as it is; give another folder: make VENV=..." >&2; exit 2; \
fi; rm -rf -- "$(VENV)"
endef

.PHONY: help setup quickstart reproduce test test-all check torture faults bench zoo gpu-check tensorboard clean

help: ## List these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  \033[1mmake %-12s\033[0m %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.core ## Create .venv and install what running needs (the other commands do this themselves)

quickstart: $(VENV)/.core ## Sweep Backforward and SGD over learning rates on small digits; print a table (3 minutes at most)
	@$(PY) src/train.py -m experiment=quickstart
	@$(PY) src/report.py table outputs/quickstart
	@echo "Curves: make tensorboard, then open http://localhost:$(PORT)"

reproduce: $(VENV)/.core ## Judge both papers' claims: outputs/report (SCALE=smoke|small|medium|paper ONLY=names STAND_IN=1 FROM=outputs/reference)
	@$(PY) src/reproduce.py $(if $(SCALE),--scale $(SCALE)) $(if $(ONLY),--only $(ONLY)) $(if $(STAND_IN),--stand-in) $(if $(FROM),--go-on-from $(FROM)) $(OVERRIDES)

test: $(VENV)/.dev ## Run the tests, but for those that take long and rarely break
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m "not slow"

test-all: $(VENV)/.dev ## Run all tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

check: $(VENV)/.dev ## Lint, format, types, direction of dependencies
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy src
	$(VENV)/bin/lint-imports

torture: $(VENV)/.dev ## Kill sweeps on MNIST 40 times at random; compare to the bit with one left alone (15 minutes)
	OMP_NUM_THREADS=1 PYTHONPATH=src $(PY) -m tests.helpers.torture --kills 40 --epochs 16

faults: $(VENV)/.dev ## Inject faults: kills, torn writes, full disks, damaged files; docs/faults.md says what holds (half an hour)
	OMP_NUM_THREADS=1 PYTHONPATH=src $(PY) -m tests.helpers.faults $(if $(STRIDE),--stride $(STRIDE))

docs: $(VENV)/.docs ## Build the documentation: outputs/site/index.html
	$(PY) docs/make_configuration.py
	$(PY) -m mkdocs build --strict

bench: $(VENV)/.core ## Measure speed: medians and ratios in one run (half an hour, on a quiet machine)
	$(PY) src/bench.py

zoo: $(VENV)/.zoo ## Compare engines on networks and optimizers from elsewhere: docs/zoo.md (an hour; resumes; ONLY=word TIMES=1)
	OMP_NUM_THREADS=1 PYTHONPATH=src $(PY) -m tests.zoo $(if $(ONLY),--only $(ONLY)) $(if $(TIMES),--times)

gpu-check: ## Check and measure on a GPU: outputs/gpu_check.json (8 minutes; installs nothing; DRY_RUN=1 on a CPU, ONLY=parts)
	@$(or $(wildcard $(PY)),$(if $(filter file,$(origin PYTHON)),$(shell command -v python)),$(PYTHON)) src/gpu_check.py $(if $(DRY_RUN),--dry-run) $(if $(ONLY),--only $(ONLY))

tensorboard: $(VENV)/.core ## Serve the curves in outputs/ on http://localhost:6006 (PORT=...)
	$(VENV)/bin/tensorboard --logdir outputs --port $(PORT)

clean: ## Remove the environment and caches; outputs/ stays
	@$(remove_venv)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis src/*.egg-info
	find src tests -name __pycache__ -prune -exec rm -rf {} +

# A stamp is older than what it was made from: install again. A broken environment is then made anew, and one that was
# moved or copied: its scripts, and its link to this source, still point to where it was.
HERE := $(abspath $(VENV))
ifneq ($(shell cat "$(VENV)/.core" 2>/dev/null),$(HERE))
.PHONY: $(VENV)/.core
endif
$(VENV)/.core: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one: make PYTHON=/path/to/python3.11")'
	@[ ! -e $@ ] || [ "$$(cat $@)" = "$(HERE)" ] || { echo "$(VENV) was made elsewhere; making it anew"; $(remove_venv); }
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
	@echo "Installing what the documentation needs ..."
	@$(PY) -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[docs]'
	@touch $@
