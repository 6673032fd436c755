# One command per job; CI runs the same ones. `make` alone lists them.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ready

# Another build of torch, for a GPU: make setup TORCH='torch==2.13.0 --index-url ...'. Kept until another is named.
KEPT := $(shell cat .venv/.torch 2>/dev/null)
CHOSEN := $(or $(strip $(TORCH)),$(KEPT))
WANTED := $(or $(CHOSEN),torch==2.13.0)
ifneq ($(CHOSEN),$(KEPT))
.PHONY: $(STAMP)
FRESH := --force-reinstall    # pip keeps a torch of the same version, whatever its build
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format bench-smoke bench-speed lock clean

help:                ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)      ## make .venv with the locked versions (fast when nothing has changed)

$(STAMP): requirements.lock pyproject.toml
	@echo "== setting up .venv (once; a few minutes, most of it torch)"
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Expected Python 3.11 or newer, but $(PYTHON) is %d.%d. Name a newer one: make setup PYTHON=python3.12" % sys.version_info[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "== installing $(WANTED)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(FRESH) $(WANTED)
	@echo "== installing the locked dependencies"
	@grep -v '^torch==' requirements.lock > .venv/requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r .venv/requirements.txt
	@echo "== installing textenv itself"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@echo '$(CHOSEN)' > .venv/.torch
	@touch $@
	@echo "== ready: $(BIN)/textenv --help"

demo: setup          ## run the main job and end with pictures
	@$(BIN)/textenv demo

test: setup          ## run the tests
	@$(BIN)/python -m pytest -n 2

check: setup         ## format, lint and type check, changing nothing
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: setup        ## format and fix what can be fixed
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench-smoke: setup   ## every kind of benchmark once, small: that it runs, resumes and reports
	@$(BIN)/textenv bench smoke --jobs 2 --overwrite

bench-speed: setup   ## ours against generate, TRL and prefix rows: half an hour on two quiet cores
	@$(BIN)/textenv bench speed

lock: setup          ## write requirements.lock from .venv
	@(sed -n '/^#/p' requirements.lock; $(BIN)/python -m pip freeze --all --exclude-editable | grep -v '^pip==' | sed 's/+cpu//') > requirements.new
	@mv requirements.new requirements.lock

clean:               ## remove what set-up, tests and runs have made
	rm -rf .venv runs build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
