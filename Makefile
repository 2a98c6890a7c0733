# Each target sets up what it needs: a virtual environment in the clone, pinned packages.
# PYTHON selects the interpreter, TORCH another build: `make TORCH=torch==2.11.0 test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= $(shell grep '^torch==' constraints.txt)
# Bytecode is compiled at the first import and kept. Compiling whole packages would take 20 s.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check --quiet install --no-compile
unexport PYTHONDONTWRITEBYTECODE

# Under test as a model of others; its requirements pin an old torch, and the tests need none.
WITHOUT_DEPS := $(shell grep -E '^(open_flamingo|einops-exts)==' constraints.txt)

# On a machine with a GPU that has its own packages, nothing is installed.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
OUT ?= bench/results/gpu

# One process per processor.
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal

# The newest release of transformers that pip finds, with everything else pinned; looked up again
# every week. NEWEST selects another: make newest NEWEST=transformers==5.10.4
NEWEST ?= transformers
NEWEST_TESTS := $(addprefix tests/test_, \
	$(addsuffix .py, answer_options api chat packing parallel_inference patch_internvl patch_mllama \
	processor train_plans train_trainer training training_parallel))
RANKS_TESTS := $(addprefix tests/test_, \
	$(addsuffix .py, batch batch_ranks bench_scaling device_map parallel_inference parallel_states \
	parallel_training sharded_errors sharded_ops train_accelerated train_elastic train_launchers \
	train_plans train_uneven_ranks train_watch_ranks))
WEEK := $(shell date +%G-%V)
READY_NEWEST := $(VENV)/newest/$(subst =,,$(NEWEST))-$(WEEK)

# Trains comemo-nano again, from drawing its pictures on: hours on two cores.
NANO ?= runs/nano
NANO_TRAIN := OMP_NUM_THREADS=1 $(BIN)/python -m torch.distributed.run --standalone \
	--nproc-per-node 2 -m comemo train

.PHONY: demo nano test test-all lint kernels newest quantised ranks serve aot bench gpu-check gpu-bench clean

demo: $(VENV)/ready
	$(BIN)/comemo demo

nano: $(VENV)/ready
	$(BIN)/python -m comemo.nano prepare $(NANO)
	for part in colours places see again; do \
		$(NANO_TRAIN) examples/nano/$$part.yaml || exit; \
	done
	$(BIN)/python -m comemo.nano export $(NANO)/again/model $(NANO)/checkpoint
	$(BIN)/comemo eval nano --model $(NANO)/checkpoint

# The gate of every change.
test: $(VENV)/ready
	$(MAKE) --no-print-directory --jobs 2 lint $(READY_NEWEST)
	$(MAKE) --no-print-directory kernels newest
	$(PYTEST)

# Also what takes too long for `make test`: tests marked slow, more draws, every configuration
# compiled, the model on a virtual GPU.
test-all: $(VENV)/ready lint aot
	TRITON_INTERPRET=1 $(PYTEST) --all
	$(PYTEST) --all
	VIRTUAL_GPU=1 $(PYTEST)

# The kernels in Triton's interpreter, on any machine.
kernels: $(VENV)/ready
	TRITON_INTERPRET=1 $(PYTEST)

# A short run on the newest transformers, which may rename things.
newest: $(READY_NEWEST)
	PYTHONPATH=$(VENV)/newest $(PYTEST) $(NEWEST_TESTS)

$(VENV)/newest/%: $(VENV)/ready
	rm -rf $(VENV)/newest
	$(INSTALL) --target $(VENV)/newest '$(NEWEST)'
	touch $@

# Every plan of several ranks with two to four processes, and nodes that leave and come back.
ranks: $(VENV)/ready
	$(PYTEST) --all $(RANKS_TESTS)

# Weights of 8 and 4 bits. torchao is beside the environment, because transformers imports it
# wherever it is, which takes half a second in each process.
quantised: $(VENV)/quantised
	PYTHONPATH=$(VENV)/quantised $(PYTEST) --all tests/test_quantised.py tests/test_docs.py

$(VENV)/quantised: $(VENV)/ready
	$(INSTALL) --no-deps --target $@ '$(shell grep '^torchao==' constraints.txt)'

# The server: 1,000 mixed requests, the page in a browser if Chromium and its driver are there, and
# replicas if Ray is installed in the environment.
serve: $(VENV)/ready
	$(PYTEST) --all tests/test_serve*.py tests/test_transformers_serve.py

# Compiles every kernel for every supported GPU architecture. Needs no GPU.
aot: $(VENV)/ready
	$(BIN)/python -m comemo_kernels.aot

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/ready
	$(BIN)/python -m bench decode

# On a machine with a GPU, each in under five minutes: correctness, then times.
# ARGS="--stages attend memory" selects stages; COMMIT names the commit of a copy without git.
gpu-check gpu-bench:
	$(if $(COMMIT),COMEMO_COMMIT=$(COMMIT)) $(GPU_PYTHON) -m bench $@ --out $(OUT) $(ARGS)

# Torch first: without a GPU its CPU build, if an index or folder that pip knows has one.
$(VENV)/ready: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	nvidia-smi -L >/dev/null 2>&1 || $(INSTALL) '$(TORCH)+cpu' 2>/dev/null || true
	$(INSTALL) '$(TORCH)'
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(INSTALL) --constraint $(VENV)/constraints.txt --editable '.[dev]'
	$(INSTALL) --no-deps $(WITHOUT_DEPS)
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
