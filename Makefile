# Everything has a name here, and CI calls the same names. `make demo` and `make test` set up what they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BUDGET_S ?= 540
WORKERS ?= 2
# Threads of tiny models wait for each other longer than they work, so each process has one.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

.PHONY: help install demo pretrain-demo finetune-demo test check bare lint types conformance bench roof report gpu tune commit-file gpu-rehearsal codegen faults sanitize clean
help:  ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

install: $(VENV)/.installed  ## the virtual environment, with everything that is needed here
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	@echo "installing PyTorch, transformers and the tools into $(VENV): a few minutes the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --upgrade pip setuptools
	@rm -f fastbert/_C.*.so
	@$(BIN)/python -m pip install -qq --no-compile -c constraints.txt -e '.[dev]'
	@ls fastbert/_C.*.so >/dev/null 2>&1 || \
	  echo "the C++ extension was not built ($(BIN)/python -m pip install -v -e . says why): pretraining needs it"
	@touch $@

demo: install  ## the main job on a real checkpoint
	@$(BIN)/fastbert demo

pretrain-demo: install  ## a tiny BERT learns from the fables that come with fastbert, from raw text, in a few minutes
	rm -rf .out/pretrain-demo
	$(BIN)/fastbert prepare fastbert/assets/fables.jsonl -o .out/pretrain-demo/corpus --train-vocab 600
	$(BIN)/fastbert pretrain --config tiny --data .out/pretrain-demo/corpus -o .out/pretrain-demo/run --steps 1000 \
	  --phases 64:0.9,128:0.1 --batch-size 32 --learning-rate 2e-3 --warmup 50 --log-every 50 --save-every 500 --device cpu
	$(BIN)/fastbert plot .out/pretrain-demo/run

TALES := .out/finetune-demo
finetune-demo: install  ## MiniLM learns which part of a tale a sentence is, from the same fables, in a few minutes
	@rm -rf $(TALES)
	@$(BIN)/python -m fastbert.tasks.fables $(TALES)
	$(BIN)/fastbert finetune classify --model $(TALES)/all-MiniLM-L6-v2 --data $(TALES)/train.csv --dev $(TALES)/dev.csv \
	  --label part --epochs 4 --learning-rate 1e-4 --eval-every 12 --log-every 3 -o $(TALES)/run
	$(BIN)/fastbert evaluate $(TALES)/run --data $(TALES)/dev.csv
	$(BIN)/fastbert predict $(TALES)/run $(TALES)/yours.txt -o $(TALES)/yours.jsonl
	@cat $(TALES)/yours.jsonl
	$(BIN)/fastbert plot $(TALES)/run

test: install  ## all tests; then the kernels' again, on the kernels, interpreted
	@echo "$(WORKERS) processes; on two cores all tests take about ten minutes, and the kernels' tests, interpreted, 2 more"
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) -m 'kernel and not plain' tests

check: install  ## what concerns one area, in less than a minute: make check AREA=attention
	@$(BIN)/python -m tests.areas $(AREA)

bare: install  ## machines that lack Triton, the C++ extension, accelerate and more, rehearsed: quick tests, and make gpu
	$(BIN)/python -m tests.bare

lint: install  ## format and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install  ## mypy, and the extension's stub against the extension
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest fastbert._C --ignore-missing-stub --allowlist csrc/stubtest.txt --mypy-config-file csrc/stubtest.ini

conformance: install  ## transformers' own model tests on fastbert's classes
	$(BIN)/python conformance/run.py

bench: RESULTS ?= .out/bench.json
bench: install  ## measure on this machine, against PyTorch and transformers, into RESULTS
	$(BIN)/python -m pytest bench --benchmark --results $(RESULTS)

roof: install  ## this machine's ceilings only
	$(BIN)/python -m pytest bench/bench_roof.py --benchmark --results .out/roof.json

report: install  ## the README's tables, and a page with pictures for every run in bench/results
	$(BIN)/python -m bench report

# For a machine with a GPU, where nothing can be fetched: from a bare checkout, with the Python that is there. Which
# commit it is of comes along in COMMIT=... or in the file .commit.
gpu: RESULTS ?= .out/gpu
gpu:  ## GPU tests, ceilings, models, kernels, the most important first, into the folder RESULTS, within BUDGET_S
	$(PYTHON) -m bench gpu --results $(RESULTS) --budget $(BUDGET_S)

tune: RESULTS ?= .out/tune
tune:  ## which tiles the kernels should take on this GPU, likewise
	$(PYTHON) -m bench tune --results $(RESULTS) --budget $(BUDGET_S)

commit-file:  ## which commit this is, into .commit, for a machine to which .git does not come: take it along
	$(PYTHON) -m bench.commit

gpu-rehearsal: install  ## both on a CPU with tiny cases: no typo waits for the GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m bench gpu --device cpu --smallest --results .out/gpu-rehearsal --budget 540
	OMP_NUM_THREADS=1 $(BIN)/python -m bench tune --device cpu --smallest --results .out/gpu-rehearsal --budget 540

codegen: install  ## what every kernel compiles to on every chip; needs no GPU
	$(BIN)/python -m bench.codegen

faults: install  ## put faults into the kernels one at a time: the tests must catch each
	$(BIN)/python -m tests.faults

CORE := $(filter-out csrc/bindings%,$(wildcard csrc/*.cpp))
sanitize:  ## the C++ core under the address, undefined-behaviour and thread sanitizers
	mkdir -p .out
	$(CXX) -std=c++17 -O1 -g -pthread -Wall -Wextra -Wconversion -Werror -fsanitize=address,undefined \
	  -fno-sanitize-recover=all $(CORE) -o .out/selftest
	.out/selftest
	$(CXX) -std=c++17 -O1 -g -pthread -fsanitize=thread $(CORE) -o .out/selftest-threads
	.out/selftest-threads

clean:
	rm -rf .out .conformance build *.egg-info fastbert/*.so
