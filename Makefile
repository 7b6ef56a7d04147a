# One word per task; each sets up what it needs. `make install` works on a fresh machine with Python 3.11 or later.
#
# PyPI's own torch wheel for Linux brings CUDA. To do without, name an index of CPU builds:
#   make install TORCH_INDEX=URL
TORCH_INDEX ?=
# Worker processes of the test run. Some tests start four ranks of their own: more than the cores help little.
JOBS ?= 2
PYTEST_ARGS ?=
ARGS ?=

PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$python; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format types bench faults docs serve constraints clean

help: ## List these tasks
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 20

install: $(INSTALLED) ## Make .venv with everything in it, .venv/bin/reshard included

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed: make install PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
ifneq ($(TORCH_INDEX),)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --index-url $(TORCH_INDEX) \
		"$$(grep -E '^torch==' constraints.txt)"
endif
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install ## Make a small sharded checkpoint with real torch ranks, convert it, compare it
	$(BIN)/python examples/demo.py $(ARGS)

test: install ## All tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

lint: install ## Style, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: install ## Rewrite the code in house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install ## mypy, strict
	$(BIN)/mypy

bench: install ## Measure against cp and torch's own tools
	$(BIN)/python -m benchmarks $(ARGS)

faults: install ## Only the tests of bad input, full disks and killed processes
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "faults or privileged" $(PYTEST_ARGS)

docs: install ## Check that the documentation is complete and that its links lead somewhere
	$(BIN)/python -m pytest -q tests/docs $(PYTEST_ARGS)

serve: install ## Run the service here
	$(BIN)/reshard serve $(ARGS)

constraints: install ## Pin what is installed now
	@{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable \
		| grep -vE '^(pip|setuptools)==' | sed -E 's/\+cpu$$//'; } > constraints.new
	@! grep -nE ' @ |://' constraints.new || { echo "not from an index, can't be pinned" >&2; rm constraints.new; exit 1; }
	@mv constraints.new constraints.txt

clean: ## Remove what the tasks made, .venv excepted
	rm -rf .demo .bench build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
