# Everything has a name here, and CI calls the same names. `make demo` and `make test` set up what they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RESULTS ?= .out/bench.json

.PHONY: help install demo test lint types conformance bench codegen faults sanitize clean
help:  ## what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

install: $(VENV)/.installed  ## the virtual environment, with everything that is needed here
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: install  ## the main job on a real checkpoint
	$(BIN)/fastbert demo

test: install  ## all tests; then the kernels' again, on the kernels, interpreted
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m kernel tests

lint: install  ## format and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install  ## mypy, and the extension's stub against the extension
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest fastbert._C --ignore-missing-stub --mypy-config-file pyproject.toml

conformance: install  ## transformers' own model tests on fastbert's classes
	$(BIN)/python conformance/run.py

bench: install  ## patched against stock transformers on this machine; the README's table is its output
	$(BIN)/python -m pytest bench --benchmark --results $(RESULTS)

codegen: install  ## what every kernel compiles to on every chip; needs no GPU
	$(BIN)/python -m bench.codegen

faults: install  ## put faults into the kernels one at a time: the tests must catch each
	$(BIN)/python -m tests.faults

sanitize:  ## the C++ core under the address and undefined-behaviour sanitizers
	mkdir -p .out
	$(CXX) -std=c++17 -O1 -g -Wall -Wextra -Wconversion -Werror -fsanitize=address,undefined -fno-sanitize-recover=all \
	  csrc/selftest.cpp csrc/packing.cpp csrc/philox.cpp -o .out/selftest
	.out/selftest

clean:
	rm -rf .out .conformance build *.egg-info fastbert/*.so
