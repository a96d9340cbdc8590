# Every target sets up all that it needs: a virtual environment, what is missing in it, the compiled library.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
# Named after what the environment may ask of setup.py, so that a change of mind builds again.
BUILT := build/.built$(if $(TORCH_CSB_CUDA),-cuda$(TORCH_CSB_CUDA))$(if $(TORCH_CSB_CUDA_ARCHS),-$(subst ;,_,$(TORCH_CSB_CUDA_ARCHS)))
SOURCES := $(shell find csrc -type f) setup.py tools/cuda_toolkit.py torch_csb/_version.py
CXX_FILES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
PYTEST_FLAGS ?=
ASAN_FLAGS ?=

.PHONY: build test asan demo wheel sdist lint format cuda-check clean
.DEFAULT_GOAL := build

$(READY): tools/bootstrap.py
	$(PYTHON) tools/bootstrap.py $(VENV)
	@touch $@

build: $(BUILT)

$(BUILT): $(READY) $(SOURCES)
	@rm -f build/.built*
	$(PY) setup.py -q build_ext --inplace
	@touch $@

test: $(BUILT)
	$(PY) -m pytest tests --durations=10 $(PYTEST_FLAGS)

asan: $(READY)
	$(PY) tools/sanitize.py $(ASAN_FLAGS)

demo: $(BUILT)
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PY) examples/demo_digits.py

wheel: $(READY)
	@rm -rf build/lib.* # setup.py packs whatever an earlier build left there
	$(PY) setup.py -q bdist_wheel
	@ls -l dist/*.whl

sdist: $(READY)
	$(PY) setup.py -q sdist
	@ls -l dist/*.tar.gz

$(VENV)/.lint: $(READY)
	$(PY) tools/bootstrap.py --lint $(VENV)
	@touch $@

lint: $(VENV)/.lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/.lint
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

cuda-check: $(READY)
	$(PY) tools/compile_cuda.py

clean:
	rm -rf build dist *.egg-info torch_csb/*.so
