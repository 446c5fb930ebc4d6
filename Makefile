# Each target sets up what it needs in .venv, from a clone with nothing but Python 3.11.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
SERVE ?=

.PHONY: help setup serve test lint chromium bench clean

help: ## show the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(VENV)/.ready: pyproject.toml setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

setup: $(VENV)/.ready-dev ## install everything, tools for development included

serve: $(VENV)/.ready ## serve the embedded model on 127.0.0.1:8000 (SERVE="--model PATH" for another)
	$(BIN)/upwell serve $(SERVE)

lint: $(VENV)/.ready-dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

# The web page's tests drive it. Not being able to install it is said by those tests, in CI as a failure.
chromium:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { \
	test "$$(id -u)" = 0 && command -v apt-get >/dev/null && export DEBIAN_FRONTEND=noninteractive && apt-get update -qq && \
	timeout 300 apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null; } || \
	echo "chromium isn't here and can't be installed: the web page's tests won't run"

test: lint chromium ## lint, types and all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q

bench: $(VENV)/.ready-dev ## speed against transformers on the same weights
	$(BIN)/python benchmarks/vs_transformers.py

clean: ## remove what was built
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
