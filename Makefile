# Every target works on a machine with python3-venv and build-essential: it makes .venv and uses it again.
#   make demo VENV=.venv-cuda TORCH="torch==2.14.1 torchvision==0.29.1" PYTHON=python3.13     in an environment of its own

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
CUDA := .venv-cuda
OLDEST := .venv-oldest

BIN := $(VENV)/bin
headers = CPATH=$$(printf %s:%s "$(CURDIR)"/$(1)/headers/usr/include "$(CURDIR)"/$(1)/headers/usr/include/python3*)
XDIST := --numprocesses auto --dist loadfile --no-loadscope-reorder
PYTEST = $(call headers,$(VENV)) $(BIN)/pytest $(XDIST)
# Compilation and peak memory do not depend on the instruction set.
ISA_TESTS := tests/ops/test_accuracy.py tests/ops/test_autograd.py tests/ops/test_regimes.py -k "not compile and not opcheck and not memory and not reference"
CXX_SOURCES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# A part of what depends on PyTorch: the compiler, autograd, subclasses, transforms.
TORCH_TESTS := $(addprefix tests/ops/test_,$(addsuffix .py,autograd environment lazy_tensors transforms)) tests/triton/test_tuning.py -k "compile_fullgraph or compiled_function or autocast or fake or export or meta or dual or negated or subclasses or candidates"
SENTENCE := a woman with dark skin, firefighter

.DEFAULT_GOAL := help
.PHONY: help demo test lint test-isas test-cuda test-oldest attack bench clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | while IFS='	' read -r target text; do printf '  make %-10s %s\n' "$$target" "$$text"; done

demo: $(VENV)/installed  ## train on emoji, generate images of a new sentence and print where they are (about 10 minutes)
	$(BIN)/icsd train --config configs/emoji.yaml
	$(BIN)/icsd sample "$(SENTENCE)" --count 4

test: lint  ## check the sources and run all tests, except those of `make attack`
	ICSD_ALL_TESTS=1 $(PYTEST)

lint: $(VENV)/installed  ## check Python with ruff and C++ with clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(wildcard .clang-format),$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES))

test-isas: $(VENV)/installed  ## run the operator's main tests with each instruction set that this machine can execute
	isas=$$($(BIN)/python -m tools.cpu_isas) && test -n "$$isas" && for isa in $$isas; do \
		echo "ICSD_CPU_ISA=$$isa"; ICSD_CPU_ISA=$$isa $(PYTEST) $(ISA_TESTS) || exit 1; \
	done

test-cuda:  ## run the operator's tests and those of evaluation in .venv-cuda, beside the CUDA build of torch; no GPU is needed
	$(MAKE) $(CUDA)/installed VENV=$(CUDA) TORCH="torch==2.14.1 torchvision==0.29.1 torch-fidelity==0.4.0 transformers==5.24.0"
	$(CUDA)/bin/icsd doctor
	ICSD_ALL_TESTS=1 $(call headers,$(CUDA)) $(CUDA)/bin/pytest $(XDIST) tests/ops tests/models tests/cli tests/evaluation -k "not sanitizers and not races"

test-oldest: $(VENV)/installed  ## run the operator's tests of autograd and torch.compile with the oldest PyTorch that is supported
	$(MAKE) $(OLDEST)/oldest VENV=$(OLDEST)
	$(call headers,$(VENV)) $(OLDEST)/bin/python -m pytest $(XDIST) $(TORCH_TESTS)

attack: $(VENV)/installed  ## run the slow tests with hostile inputs, which `make test` leaves out
	$(call headers,$(VENV)) $(BIN)/pytest --numprocesses 0 -m attack --capture no tests

bench: $(VENV)/installed-bench  ## measure the operator against plain and compiled PyTorch
	$(call headers,$(VENV)) $(BIN)/python -m benchmarks

clean:  ## remove the environments and everything that was built; runs/ stays
	rm -rf .venv $(CUDA) $(OLDEST) build dist *.egg-info icsd/*.so .pytest_cache .ruff_cache .hypothesis .benchmarks
	find icsd tests -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

# Debian has Python.h in a package of its own. Where it is missing, unpack that package here, which needs no root.
$(VENV)/headers: | $(VENV)/bin/pip
	rm -rf $@.part && mkdir -p $@.part
	if ! test -e "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h"; then \
		cd $@.part && apt-get download libpython3-dev "lib$$(../bin/python -c 'import sysconfig; print("python" + sysconfig.get_python_version())')-dev" \
		&& for package in *.deb; do dpkg -x $$package . || exit 1; done; \
	fi
	mv $@.part $@

$(VENV)/installed: pyproject.toml setup.py $(shell find csrc -type f) | $(VENV)/headers
	$(BIN)/pip install $(TORCH)
	$(call headers,$(VENV)) $(BIN)/pip install -e ".[emoji,test]"
	touch $@

# The native module is that of the checkout: it does not depend on PyTorch.
$(VENV)/oldest: | $(VENV)/bin/pip
	$(BIN)/pip install --no-compile torch==2.10.0 numpy pytest pytest-timeout pytest-xdist hypothesis
	touch $@

$(VENV)/installed-bench: $(VENV)/installed
	$(call headers,$(VENV)) $(BIN)/pip install -e ".[bench]"
	$(BIN)/pip install --no-deps torchdistill==1.1.5
	touch $@
