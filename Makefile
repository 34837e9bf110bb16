# Everything runs from a bare clone: the first target makes .venv with the versions in constraints.txt.
PYTHON ?= python3
# `make test TORCH=2.11.0` tests on another version in .venv-2.11.0, with numpy<2.4 (which Triton before 3.7 interprets on) and
# the setuptools that it asks for.
PINNED := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH ?= $(PINNED)
VENV := .venv$(if $(filter-out $(PINNED),$(TORCH)),-$(TORCH))
BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal
INSTALLED := $(VENV)/.installed
CONSTRAINTS := $(if $(filter .venv,$(VENV)),constraints.txt,$(VENV)/constraints.txt)

.PHONY: demo test test-all check check-style types bench mutations coverage clean

demo: $(INSTALLED)            # a Mixtral folded over 8 processes, next to the same model in one
	$(BIN)/python -m foldcc

test: $(INSTALLED)            # all tests that are not marked slow
	$(PYTEST)

test-all: $(INSTALLED)        # all tests
	$(PYTEST) -m ""

check: check-style test       # what a change must pass

check-style: $(INSTALLED) types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy wants the packages where imports say they are, so it reads a tree of links.
types: $(INSTALLED)
	rm -rf build/types && mkdir -p build/types/foldcc
	ln -s $(CURDIR)/foldcc/* $(CURDIR)/passes $(CURDIR)/codegen build/types/foldcc
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p foldcc

bench: $(INSTALLED)           # those that need no GPU; benchmarks/kernels.py needs one
	for benchmark in compile_time step_time verify aot; do $(BIN)/python benchmarks/$$benchmark.py || exit; done

mutations: $(INSTALLED)       # plants every mistake and tables which checker finds it; a quarter of an hour
	$(BIN)/python -m tests.mutations

coverage: $(INSTALLED)        # folds every causal language model type of Transformers, made small; half an hour
	OMP_NUM_THREADS=1 $(BIN)/python -m foldcc coverage --out docs/coverage.md

# torch comes first and alone, so that nothing else chooses its version.
$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e ".[hf,testing,dev]"
	touch $@

.venv-$(TORCH)/constraints.txt: constraints.txt
	mkdir -p $(@D)
	grep -vE '^(torch|triton|numpy|setuptools)==' $< > $@
	printf 'torch==%s\nnumpy<2.4\n' $(TORCH) >> $@

clean:
	rm -rf .venv .venv-* build dist *.egg-info foldcc-demo .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
