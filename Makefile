# Every target does its own set-up. PYTHON chooses the interpreter (3.11 to 3.13).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Extra arguments for the installation of torch, e.g. TORCH_PIP_ARGS="--index-url <index of CPU builds>"
TORCH_PIP_ARGS ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup system-packages serve demo test chaos load lint bench docs-results clean

help: ## what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: $(STAMP) ## virtual environment in .venv with everything installed

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else "Python 3.11 to 3.13 is needed, this is %d.%d; call make PYTHON=python3.12" % v)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "the virtual environment could not be made: install python3-venv"; exit 1; }
	$(BIN)/pip install -q --upgrade pip
	@# pip takes what is there already: the CPU build stays where no GPU asks for more
	$(BIN)/pip install -q $(TORCH_PIP_ARGS) "torch>=2.11,<2.14"
	$(BIN)/pip install -q -e ".[train,dev]"
	@touch $@

system-packages: ## Debian packages that the tests talk to (Orthanc, DCMTK, validators)
	@bash tests/system_packages.sh

serve: $(STAMP) ## run the node with osteo.toml (CONFIG=other.toml for another)
	$(BIN)/osteo serve --config $(or $(CONFIG),osteo.toml)

demo: $(STAMP) ## a virtual patient through the whole node; shows the report
	$(BIN)/osteo demo --out demo-output

# One test process a core, a module's tests in one of them. Threads of torch beside them would only spin.
test: $(STAMP) system-packages lint ## all tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadscope

chaos: $(STAMP) system-packages ## 200 rounds of SIGKILL against a node under load (ROUNDS, SEED); prints the losses
	$(BIN)/python -m tests.e2e.chaos --rounds $(or $(ROUNDS),200) --seed $(or $(SEED),1)

load: $(STAMP) ## a week of clinical load at speed; figures and plot go to docs/results
	$(BIN)/python -m benchmarks.load

lint: $(STAMP) ## style, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP) ## the quick form of every benchmark; figures go to docs/results
	$(BIN)/python -m benchmarks.all --quick

docs-results: $(STAMP) ## write the documents' tables, the localizer's card, the conformance statement and the reference anew
	$(BIN)/python -m benchmarks.tables
	$(BIN)/python -m train.localizer_card
	$(BIN)/osteo conformance --out docs/conformance-statement.md
	$(BIN)/osteo reference cli --out docs/cli.md

clean: ## remove what make made
	rm -rf $(VENV) demo-output
