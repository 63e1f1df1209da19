# From a bare clone with python3 (3.11 or newer) and make: every target installs what it needs
# into .venv first, and does so again only when pyproject.toml changes.

PYTHON ?= python3
ARGS   ?=
VENV   := .venv
BIN    := $(VENV)/bin
FAULTS := benchmarks/results/faults.json

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow test-lowest test-gpu test-peers faults audit lint format clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | \
	    while IFS='|' read -r name text; do printf '  make %-10s %s\n' "$$name" "$$text"; done

demo: $(VENV)/installed ## run both examples on the small model that comes with the package
	$(BIN)/python example_text_completion.py
	$(BIN)/python example_chat_completion.py

test: $(VENV)/installed-test ## run the tests (ARGS="-k name" narrows them)
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

test-slow: $(VENV)/installed-test ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

test-lowest: $(VENV)/installed-lowest ## run the tests with the lowest versions that pyproject.toml allows
	$(PYTHON) -m venv --clear build/lowest
	$(BIN)/uv pip compile --quiet --resolution lowest-direct --extra test pyproject.toml \
	    --output-file build/lowest/requirements.txt
	build/lowest/bin/python -m pip install --quiet --requirement build/lowest/requirements.txt
	build/lowest/bin/python -m pip install --quiet --no-deps --editable .
	build/lowest/bin/python -m pytest -n auto --dist loadfile $(ARGS)

test-gpu: $(VENV)/installed-test ## run the tests that need a GPU, on this machine's
	LLAMA_TEST_GPU=1 $(BIN)/python -m pytest -m gpu $(ARGS)

test-peers: $(VENV)/installed-test $(VENV)/installed-bench ## compare with llama.cpp (needs a C++ compiler)
	$(BIN)/python -m pytest -m llama_cpp $(ARGS)

faults: $(VENV)/installed-test ## try every fault of docs/reliability.md (takes two hours), and count
	rm -f $(FAULTS)
	LLAMA_FAULTS=$(FAULTS) $(BIN)/python -m pytest tests/faults -o faulthandler_timeout=1800 \
	    $(ARGS); status=$$?; \
	    PYTHONPATH=tests $(BIN)/python scripts/reliability.py; exit $$status

audit: $(VENV)/installed-audit ## list the packages of .venv, their licences and known vulnerabilities
	mkdir -p build/audit
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
	    -o build/audit/sbom.cdx.json $(BIN)/python
	$(BIN)/pip-licenses --order license --format markdown --output-file build/audit/licences.md
	$(BIN)/python -m pip list --exclude-editable --format freeze | sed 's/+.*//' \
	    > build/audit/requirements.txt # without labels such as +cpu, which the database lacks
	$(BIN)/pip-audit --strict --no-deps --disable-pip -r build/audit/requirements.txt

lint: $(VENV)/installed-lint ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/installed-lint ## fix what ruff can fix
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove .venv, build and every cache
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Made anew where PYTHON is another version than the one that made it.
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
$(VENV)/created: $(if $(wildcard $(VENV)/python-$(VERSION)),,always)
	$(PYTHON) -m venv --clear $(VENV)
	@touch $(VENV)/python-$(VERSION) $@

.PHONY: always
always:

$(VENV)/installed: pyproject.toml $(VENV)/created
	@echo "Installing llama-reference into $(VENV) (minutes the first time)"
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/installed-%: pyproject.toml $(VENV)/created
	@echo "Installing llama-reference[$*] into $(VENV) (minutes the first time)"
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@
