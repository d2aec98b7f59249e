# make serve | test | lint | bench | clean. Everything is installed into .venv, once, and again when its versions change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MODEL ?= demo
PORT ?= 8000

# The law of the code base first, whole servers and processes last.
AREAS := $(filter-out tests/e2e tests/__pycache__,$(patsubst %/,%,$(sort $(wildcard tests/*/))))
TESTS := tests/test_architecture.py $(wildcard tests/test_*.py) $(AREAS) $(wildcard tests/e2e)

.PHONY: serve test lint bench install clean

serve: $(STAMP) ## the model with an offline job beside it: make serve [MODEL=folder] [PORT=8000] [ARGS="more flags"]
	@$(BIN)/python examples/serve_with_job.py examples/offline.jsonl -- $(MODEL) --port $(PORT) $(ARGS)

test: $(STAMP) ## make test [ARGS="-k name"]
	$(BIN)/python -m pytest $(TESTS) $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/mypy

bench: $(STAMP) ## about half an hour on an otherwise idle machine; bench/README.md says how to read it
	$(BIN)/python -m bench.scheduler
	$(BIN)/python -m bench.engine
	$(BIN)/python -m bench.colocation

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Sluice needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Installing into $(VENV) (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean: ## all that make and the tools made, but not the demo model in the cache folder
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
