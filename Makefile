# One command per job; CI runs the same ones. `make` alone lists them.
PYTHON ?= python3
TORCH ?= torch==2.13.0        # another build, for a GPU: make setup TORCH=...
BIN := .venv/bin
STAMP := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format bench-smoke lock clean

help:                ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

setup: $(STAMP)      ## make .venv with the locked versions (fast when nothing has changed)

$(STAMP): requirements.lock pyproject.toml
	@echo "== setting up .venv (once; a few minutes, most of it torch)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "== installing $(strip $(TORCH))"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	@echo "== installing the locked dependencies"
	@grep -v '^torch==' requirements.lock > .venv/requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r .venv/requirements.txt
	@echo "== installing textenv itself"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
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

bench-smoke: setup   ## a quick look at the rollout's speed
	@$(BIN)/python -m benchmarks.speed --smoke

lock: setup          ## write requirements.lock from .venv
	@(sed -n '/^#/p' requirements.lock; $(BIN)/python -m pip freeze --all --exclude-editable | grep -v '^pip==' | sed 's/+cpu//') > requirements.new
	@mv requirements.new requirements.lock

clean:               ## remove what set-up, tests and runs have made
	rm -rf .venv runs build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
