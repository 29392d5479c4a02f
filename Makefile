# `make sample` and `make test` need only Python 3.11+, a C++ compiler and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: sample test nightly bench bench-readme gpu-check lint aot sanitize clean

sample: .venv/ready
	$(BIN)/fastdiff sample --model fashion-mnist --steps 50 --guidance 1 --seed 0 --out samples.png

test: .venv/ready
	$(BIN)/python -m pytest tests

# generated input, ten thousand examples a call
nightly: .venv/ready
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest tests/test_bad_*.py

bench: .venv/ready
	$(BIN)/python bench/run.py --steps 50

# measures the README's figures again; fails where a ratio falls below what it says
bench-readme: .venv/ready
	$(BIN)/python bench/run.py --steps 50 --readme

gpu-check: .venv/ready
	$(BIN)/python -m bench.gpu_check

lint: .venv/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# the C++ tests and every case of every record under the sanitizers
sanitize: .venv/ready
	$(BIN)/python csrc/ninja_build.py build/sanitize/address address
	$(BIN)/python csrc/ninja_build.py build/sanitize/thread thread
	$(BIN)/python tests/sanitized.py build/sanitize/records

aot: .venv/ready
	$(BIN)/python -m fastdiff.aot --cuda --out docs/gpu_static.md

# torch 2.13.0 where a CPU wheel of it is at hand, else what the index serves
.venv/ready: pyproject.toml setup.py $(wildcard csrc/*.h csrc/*.cpp csrc/*.py csrc/cpu/* csrc/cuda/*)
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -e ".[triton,bench,test,lint]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info fastdiff/*.so
