# Each of these sets itself up first: a .venv beside this file, made anew when the requirements change.
# PYTHON names the Python for it (3.10 to 3.13), JOBS the number of test processes (three keep
# two cores busy: pages and servers mostly wait), ARGS what to pass on.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import ensurepip, sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& echo $$p && break; done)
JOBS ?= 3
ARGS ?=

PY := .venv/bin/python
READY := .venv/ready
PIP := $(PY) -m pip --disable-pip-version-check install -qq
TORCH := $(shell grep '^torch==' requirements-dev.txt)

.DEFAULT_GOAL := help
.PHONY: help demo test check fuzz hosts company churn formats locales help-pictures architectures bench bench-comfy bench-forge bench-adapters bench-make \
	bench-calibration bench-training bench-gpu kernels kernels-report clean

help:  ## what there is to make
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 17

demo: $(READY)  ## a contact sheet of the demo model and a table: demo.png
	$(PY) benchmarks/demo.py $(ARGS)

# one process runs all tests of a running host, which starts once (tests/conftest.py), and what takes longest comes first
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist loadscope --no-loadscope-reorder

test: $(READY)  ## all tests; those that need a GPU or a host say so where there is none
	$(PYTEST) $(ARGS)

check: $(READY)  ## ruff, mypy, and who may import whom
	$(PY) -m ruff check .
	cd .venv && bin/python -m mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache
	$(PY) -m pytest -q tests/test_layering.py

fuzz: $(READY)  ## hostile files and adapters, 20,000 of each kind; ARGS="gguf_reader --inputs 2000000", or --help
	OMP_NUM_THREADS=1 $(PY) tests/fuzz $(ARGS)

hosts: $(READY)  ## every suite and every page in every ComfyUI (COMFYUI_PATH) and Forge; `make test` lets older ones take turns
	GRAFT_EVERY_HOST=1 $(PYTEST) tests/test_comfyui.py tests/test_comfyui_frontend.py tests/test_forge_server.py $(ARGS)

company: $(READY)  ## beside other packs (COMFYUI_PEERS), each alone and all together, in every ComfyUI
	GRAFT_EVERY_HOST=1 OMP_NUM_THREADS=1 $(PY) -m pytest -q -s tests/test_company.py tests/test_distributed.py $(ARGS)

churn: $(READY)  ## 1,000 random operations in one process of every ComfyUI (COMFYUI_PATH), 200 pictures in every Forge
	GRAFT_EVERY_HOST=1 GRAFT_CHURN=1000 $(PY) -m pytest -q -s tests/test_comfyui.py -k churn $(ARGS)
	GRAFT_CHURN=200 $(PY) -m pytest -q -s tests/test_forge_server.py -k churn $(ARGS)

formats: $(READY)  ## write the matrix of types in docs/formats.md anew
	$(PY) benchmarks/formats_matrix.py

locales: $(READY)  ## write locales/en anew from the nodes; locales/zh is written by hand
	$(PY) benchmarks/locales_en.py

help-pictures: $(READY)  ## draw the pictures in help pages anew, from the newest ComfyUI in Chromium
	$(PY) benchmarks/help_pictures.py $(ARGS)

architectures: $(READY)  ## load, and save, a small model of every class that the newest ComfyUI knows: docs/architectures.md
	$(PY) benchmarks/architectures_table.py $(ARGS)

bench: test  ## every benchmark that runs without a GPU, after the tests
	$(MAKE) bench-comfy bench-forge bench-adapters

bench-comfy: $(READY)  ## a step in ComfyUI, against city96/ComfyUI-GGUF (COMFYUI_PATH, COMFYUI_GGUF)
	$(PY) benchmarks/bench_comfy.py $(ARGS)

bench-forge: $(READY)  ## a step in Forge and Forge Neo, against their own LoRAs (FORGE_PATH)
	$(PY) benchmarks/bench_forge.py $(ARGS)

bench-adapters: $(READY)  ## what each kind of adapter costs beside its layer
	$(PY) benchmarks/bench_adapters.py $(ARGS)

bench-make: $(READY)  ## how fast GGUF files are made, in how much memory, how large they are, what baking a LoRA in loses
	$(PY) benchmarks/bench_make.py $(ARGS)

bench-calibration: $(READY)  ## what calibration is worth in each type, on the demo model
	$(PY) benchmarks/calibration.py $(ARGS)

bench-training: $(READY)  ## LoRAs learnt on quantized weights, on the demo model: tables and docs/training.png
	$(PY) benchmarks/bench_training.py $(ARGS)

bench-gpu: $(READY)  ## the kernels on this GPU, results and times, in under 5 minutes: CSVs and a plot
	$(PY) benchmarks/bench_gpu.py $(ARGS)

kernels: $(READY)  ## the compiled kernels' budgets, every type for every card; `make test` has one type of each kind
	GRAFT_EVERY_TYPE=1 $(PYTEST) tests/test_triton_compile.py $(ARGS)

kernels-report: $(READY)  ## registers, spills and instructions of every kernel, compiled without a GPU
	$(PY) benchmarks/kernels_report.py $(ARGS)

clean:  ## remove .venv and what was built
	rm -rf .venv build .pytest_cache .mypy_cache .ruff_cache .hypothesis

# PyPI's torch for Linux brings several GB of CUDA along. Without an NVIDIA GPU a build that pip finds at hand
# (PIP_FIND_LINKS) will do, else PyTorch's own for CPUs, and only then PyPI's.
$(READY): requirements.txt requirements-dev.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.10 to 3.13 with venv found: install one, or say make PYTHON=..."; exit 1; }
	@echo "setting up .venv with $(PYTHON), once"
	@$(PYTHON) -m venv --clear .venv
	@if [ "$$(uname)" = Linux ] && ! nvidia-smi >/dev/null 2>&1; then \
		$(PIP) --no-deps --no-index $(TORCH) 2>/dev/null || \
		$(PIP) --no-deps --retries 1 --timeout 20 --index-url https://download.pytorch.org/whl/cpu $(TORCH) || \
		echo "no CPU build of torch to be had: taking PyPI's"; \
	fi
	@$(PIP) -r requirements-dev.txt
	@ln -sfn .. .venv/graft
	@touch $@
