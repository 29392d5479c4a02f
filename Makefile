# `make sample` and `make test` need only Python 3.11+, a C++ compiler and make.
PYTHON ?= python3
BIN := .venv/bin
# its CPU wheel where that is at hand, else what the index serves
TORCH := torch==2.13.0

.PHONY: sample test nightly bench bench-readme bench-compare bench-baseline gpu-check lint package aot
.PHONY: sanitize clean

sample: .venv/ready
	$(BIN)/fastdiff sample --model fashion-mnist --steps 50 --guidance 1 --seed 0 --out samples.png

# two files at a time, whose threads sleep while they wait: spinning, they would take the other's core
test: .venv/ready
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder

# generated input, ten thousand examples a call (networks and commands a quarter); and every case of
# every kernel for GPUs compiled for every target
nightly: .venv/ready
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest tests/test_bad_*.py tests/test_aot.py \
		tests/test_cuda.py

bench: .venv/ready
	$(BIN)/python bench/run.py --steps 50

# measures the figures of README or docs/avx2.md again; fails where a ratio falls below what it says
bench-readme: .venv/ready
	$(BIN)/python bench/run.py --steps 50 --readme

# pytest-benchmark's suites against the stored baseline; fails where a median has doubled
COMPARED := pytest bench --benchmark-storage=file://bench/baselines --benchmark-columns=median,iqr,rounds
bench-compare: .venv/ready
	$(BIN)/python -m $(COMPARED) --benchmark-compare --benchmark-compare-fail=median:100%

# the baseline of this machine
bench-baseline: .venv/ready
	rm -rf bench/baselines
	$(BIN)/python -m $(COMPARED) --benchmark-save=baseline

gpu-check: .venv/ready
	$(BIN)/python -m bench.gpu_check

lint: .venv/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# dist/: the sdist, and of that alone the wheel; both checked, and the wheel tried where nothing else is.
# What setuptools listed last time (in the egg-info) would be packed again.
CLEAN := build/package
package: .venv/ready
	$(BIN)/pip install -q -e ".[package]"
	rm -rf dist $(CLEAN) fastdiff.egg-info
	$(BIN)/check-manifest
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl
	$(PYTHON) -m venv $(CLEAN)
	$(CLEAN)/bin/pip install -q $(TORCH) pytest hypothesis
	$(CLEAN)/bin/pip install -q dist/*.whl
	tar -xzf dist/*.tar.gz -C $(CLEAN)
	cd $(CLEAN) && bin/fastdiff doctor
	cd $(CLEAN) && bin/fastdiff sample --num 2 --steps 2 --out samples.png
	cd $(CLEAN) && bin/pytest -q $(patsubst %,fastdiff-*/tests/test_%.py,tables samplers ops)

# the C++ tests and every case of every record under the sanitizers
sanitize: .venv/ready
	$(BIN)/python csrc/ninja_build.py build/sanitize/address address
	$(BIN)/python csrc/ninja_build.py build/sanitize/thread thread
	$(BIN)/python tests/sanitized.py build/sanitize/records

aot: .venv/ready
	$(BIN)/python -m fastdiff.aot --cuda --out docs/gpu_static.md

.venv/ready: pyproject.toml setup.py $(wildcard csrc/*.h csrc/*.cpp csrc/*.py csrc/cpu/* csrc/cuda/*)
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -e ".[triton,bench,test,lint]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info fastdiff/*.so
