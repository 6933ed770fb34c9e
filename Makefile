PYTHON ?= python3
BIN := .venv/bin
NATIVE := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml
CXX_FILES := $(shell find csrc tests/native -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.PHONY: train studies test test-slow mutate lint format bench bench-suite gpu-check gpu-dry-run figures clean

train: .venv/built  ## train a CSRAE on scikit-learn's digits; everything goes to runs/digits
	$(BIN)/csdiv train --output-dir runs/digits --overwrite --num-threads 1

studies: .venv/built  ## the studies on scikit-learn's digits; reports go to runs/studies/digits
	$(BIN)/csdiv study density
	$(BIN)/csdiv study clustering
	$(BIN)/csdiv study semisupervised
	$(BIN)/csdiv study faces

test: .venv/built  ## every test but those that compile or train for minutes
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: .venv/built  ## those: sanitizers, wheels, kernels for every architecture, seeded bugs, killed runs
	$(BIN)/python -m pytest -m slow

mutate: .venv/built  ## change every arithmetic line of the CPU kernels in turn: a test must turn red (hours)
	$(BIN)/python tests/mutate.py --output tests/mutation.json

lint: .venv/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: .venv/built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: .venv/built  ## csdiv beside its peers on this CPU: table, docs/benchmarks.md and its figures (minutes)
	$(BIN)/python -m bench cpu --output bench/results/cpu.json
	$(BIN)/python -m bench limits --output bench/results/limits.json
	$(BIN)/python -m bench step --output bench/results/step.json
	$(BIN)/python -m bench report

bench-suite: .venv/built  ## csdiv alone, under pytest-benchmark: to compare commits
	$(BIN)/python -m pytest bench/suite.py --benchmark-json=build/suite.json

gpu-check:  ## on a machine with a GPU, in the environment at hand: build, contract, compute-sanitizer, benchmarks
	$(PYTHON) bench/gpu_check.py $(GPU_CHECK)

gpu-dry-run: .venv/built  ## the same without a GPU, on the emulation and the PTX machine: its numbers mean nothing
	$(BIN)/python bench/gpu_check.py --dry-run

figures: .venv/built runs/digits/model.safetensors  ## the README's picture
	$(BIN)/python docs/figures.py

runs/digits/model.safetensors:
	$(MAKE) train

clean:
	rm -rf .venv build dist *.egg-info csdiv/_C.*

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

.venv/built: .venv/installed $(NATIVE)
	$(BIN)/pip install --quiet --no-build-isolation --no-deps -e .
	touch $@
