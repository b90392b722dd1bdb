# Needs python3 and the package registries alone. uv is taken from PATH, or else installed into .uv here.
SHELL := /bin/bash
UV := $(shell command -v uv)
ifeq ($(UV),)
  UV := .uv/bin/uv
  # A bootstrapped uv leaves nothing outside this folder.
  export UV_CACHE_DIR ?= $(CURDIR)/.uv/cache
  export UV_PYTHON_INSTALL_DIR ?= $(CURDIR)/.uv/python
endif
# Compiled once here, packages start several times faster in every Ray worker.
export UV_COMPILE_BYTECODE ?= 1
PYTHON := .venv/bin/python
# The builds of torch and DALI: cuda13, or cuda12 for older GPU drivers (docs/training.md, GPUs).
CUDA ?= cuda13
SYNCED := .venv/.synced-$(CUDA)

.PHONY: help demo test test-slow mutants image-test lowest lint format types settings bench imagenet-check clean
help:
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(SYNCED) ## the main job on built-in data: prepare, train both models, evaluate, report (in demo/)
	$(PYTHON) jobs/pipeline.py --source shapes --num-train 700 --num-test 300 --out demo --workers 2 --shards 2

test: lint types ## lint, types and all tests but the slow ones, in two processes
	$(PYTHON) -m pytest -n 2 --dist loadgroup --no-loadscope-reorder -m "not slow and not image"

test-slow: $(SYNCED) ## the tests that take more than a minute each
	$(PYTHON) -m pytest -m "slow and not image"

mutants: $(SYNCED) ## plant faults in the code and see the tests find them (minutes)
	$(PYTHON) tests/mutants.py

image-test: $(SYNCED) ## build the image and run it confined (needs root, buildah, mmdebstrap, 20 GB)
	$(PYTHON) -m pytest -rP tests/image

lowest: $(SYNCED) ## the unit tests with the lowest versions that pyproject.toml allows (in .venv-lowest)
	$(UV) venv --quiet --clear --python $(PYTHON) .venv-lowest
	$(UV) pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct --editable ".[cuda12]"
	$(UV) pip install --quiet --python .venv-lowest/bin/python --group dev
	.venv-lowest/bin/python -m pytest -n 2 --dist loadgroup -m "not slow" tests/unit

settings: $(SYNCED) ## write docs/settings.md from the declarations of the settings
	$(PYTHON) docs/settings.py

lint: $(SYNCED) ## ruff: lint and format
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

format: $(SYNCED) ## rewrite the code in ruff's format
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

types: $(SYNCED) ## mypy
	.venv/bin/mypy

bench: $(SYNCED) ## what docs/ quotes, on DATA, a prepared CIFAR-10 (hours; writes benchmarks/results)
	@[ -n "$(DATA)" ] || { echo "make bench needs DATA=FOLDER, a prepared CIFAR-10"; exit 2; }
	$(PYTHON) benchmarks/parity.py
	$(PYTHON) benchmarks/input.py --data $(DATA) --num-images 50000 --rounds 5
	$(PYTHON) benchmarks/prepare.py --pictures 2000 --repeat 3 --only speed
	$(PYTHON) benchmarks/prepare.py --pictures 2000 --repeat 1 --only memory
	$(PYTHON) benchmarks/step.py --rounds 3 --num-steps 4
	$(PYTHON) benchmarks/features.py --data $(DATA) --rounds 2 --global-batch-size 64
	$(PYTHON) benchmarks/scaling.py --data $(DATA) --rounds 3 --num-images 1000 --num-skipped 4 --num-steps 12 \
	  --global-batch-size 64
	$(PYTHON) benchmarks/growth.py --data $(DATA)
	$(PYTHON) benchmarks/job.py --data $(DATA) --rounds 3 --num-skipped 10 --num-steps 20 --global-batch-size 64
	$(PYTHON) benchmarks/peers.py --data $(DATA) --rounds 3 --num-skipped 2 --num-steps 5 --global-batch-size 64
	$(PYTHON) benchmarks/recovery.py
	! nvidia-smi || $(PYTHON) benchmarks/gpu_suite.py --data $(DATA) --minutes 4.3

imagenet-check: $(SYNCED) ## download ResNet50V2's ImageNet weights and hold them against Keras (needs network)
	$(PYTHON) jobs/weights.py --out .weights
	IMAGENET_WEIGHTS="$$(echo $(CURDIR)/.weights/*.h5)" $(PYTHON) -m pytest -rP tests/parity -k published_imagenet

clean: ## remove what make made, but for uv
	rm -rf .venv .venv-lowest demo .weights .pytest_cache .mypy_cache .ruff_cache

$(SYNCED): pyproject.toml uv.lock | $(UV)
	$(UV) sync --locked --extra $(CUDA)
	@rm -f .venv/.synced* && touch $@

.uv/bin/uv:
	@echo "uv is not on PATH: installing it into .uv"
	@{ python3 -m venv .uv && .uv/bin/python -m pip install --quiet --no-cache-dir uv; } \
	  || { rm -rf .uv && python3 -m pip install --quiet --no-cache-dir --target .uv uv; } \
	  || { rm -rf .uv; echo "error: python3 has neither venv nor pip; install uv or python3-venv" >&2; exit 1; }
