# Every target is complete on a machine that has python3-venv and build-essential: it makes and reuses .venv.
#   make demo VENV=.venv-cuda TORCH="torch==2.14.1 torchvision==0.29.1" PYTHON=python3.13     in an environment of its own

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
CUDA := .venv-cuda

BIN := $(VENV)/bin
HEADERS = $$(echo $(CURDIR)/$(VENV)/headers/usr/include $(CURDIR)/$(VENV)/headers/usr/include/python3* | tr ' ' ':')
SENTENCE := a woman with dark skin, firefighter

.DEFAULT_GOAL := help
.PHONY: help demo test test-cuda bench clean

help:  ## say what there is
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST)

demo: $(VENV)/installed  ## train on emoji, generate an unseen sentence, and say where the images are (about 10 minutes)
	$(BIN)/icsd train --config configs/emoji.yaml
	$(BIN)/icsd sample "$(SENTENCE)" --count 4

test: $(VENV)/installed  ## run all tests and the linter
	$(BIN)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder
	$(BIN)/ruff check .

test-cuda:  ## run the operator's tests in .venv-cuda, beside the CUDA build of torch; no GPU is needed
	$(MAKE) $(CUDA)/installed VENV=$(CUDA) TORCH="torch==2.14.1 torchvision==0.29.1"
	$(CUDA)/bin/icsd doctor
	$(CUDA)/bin/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder tests/ops tests/models tests/cli -k "not sanitizers and not races"

bench: $(VENV)/installed-bench  ## measure the operator against plain and compiled PyTorch
	CPATH=$(HEADERS) $(BIN)/python -m benchmarks

clean:  ## remove the environment and everything built (runs/ stays)
	rm -rf .venv $(CUDA) build dist *.egg-info icsd/*.so .pytest_cache .ruff_cache .hypothesis .benchmarks
	find icsd tests -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

# Python.h is in a Debian package of its own; where it is missing, unpack that package here: no root needed.
$(VENV)/headers: | $(VENV)/bin/pip
	mkdir -p $@
	if ! test -e "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h"; then \
		cd $@ && apt-get download libpython3-dev "lib$$(../bin/python -c 'import sysconfig; print("python" + sysconfig.get_python_version())')-dev" \
		&& for package in *.deb; do dpkg -x $$package .; done; \
	fi

$(VENV)/installed: pyproject.toml setup.py $(shell find csrc -type f) | $(VENV)/headers
	$(BIN)/pip install $(TORCH)
	CPATH=$(HEADERS) $(BIN)/pip install -e ".[emoji,test]"
	touch $@

$(VENV)/installed-bench: $(VENV)/installed
	CPATH=$(HEADERS) $(BIN)/pip install -e ".[bench]"
	$(BIN)/pip install --no-deps torchdistill==1.1.5
	touch $@
