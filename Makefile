# Every target does its own set-up: a virtual environment in .venv, made once and again when requirements change.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed

.PHONY: demo test thorough compat audit figures notebooks reproduce lint format clean vllm-test vllm-demo vllm-matrix llama

$(STAMP): requirements.txt pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -r requirements.txt
	$(PY) -m pip install --quiet --no-deps -e .
	touch $(STAMP)

demo: $(STAMP)
	$(PY) -m fluxmoe demo

test: $(STAMP)
	$(PY) -m pytest

# What `test` proves on a part, on the whole.
thorough: $(STAMP)
	$(PY) -m pytest -m thorough

# The kernels under the oldest Triton that they must run on: compiled and audited, then interpreted. In an environment of
# its own; Triton goes in last and alone, since torch's CUDA builds want the one that they were released with.
COMPAT := .venv-compat

$(COMPAT)/.installed: requirements.txt pyproject.toml
	test -x $(COMPAT)/bin/python || $(PYTHON) -m venv $(COMPAT)
	$(COMPAT)/bin/python -m pip install --quiet -r requirements.txt "numpy<2.4"
	$(COMPAT)/bin/python -m pip install --quiet --no-deps triton==3.6.0
	$(COMPAT)/bin/python -m pip install --quiet --no-deps -e .
	touch $@

compat: $(COMPAT)/.installed
	$(COMPAT)/bin/python -m fluxmoe.kernels.audit --arch sm_90
	$(COMPAT)/bin/python -m pytest tests/kernels

# With vLLM itself, its build for the CPU, in an environment of its own: the plug-in's tests, and a server that fits its
# experts into memory in which vLLM alone does not start.
VLLM := .venv-vllm

$(VLLM)/.installed: tests_vllm/install.py pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python tests_vllm/install.py $(VLLM_VERSION)
	touch $@

# Two files at a time: a start of vLLM is mostly one thread's.
vllm-test: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest --override-ini addopts=-q -n 2 --dist loadfile tests_vllm

vllm-demo: $(VLLM)/.installed
	$(VLLM)/bin/python -m tests_vllm.demo

# The same tests with each version that there is a build for the CPU of, in environments that are removed after.
vllm-matrix:
	$(PYTHON) tests_vllm/matrix.py

# llama.cpp, built for this machine's CPU, as a peer of `versus walls`: ten minutes on two cores.
LLAMA := .venv-llama

llama:
	test -x $(LLAMA)/bin/python || $(PYTHON) -m venv $(LLAMA)
	CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" $(LLAMA)/bin/pip install --quiet llama-cpp-python

# Every figure again, from the committed results alone.
figures: $(STAMP)
	$(PY) -m fluxmoe figures

# The notebooks with their outputs, in place. `tour` measures: let nothing else run.
notebooks: $(STAMP)
	$(PY) notebooks/execute.py

# Everything that this machine can run is made again and compared with the committed results: hours on two cores.
reproduce: $(STAMP)
	$(PY) -m fluxmoe reproduce

# The machine code of every kernel on four architectures; `make test` compiles a part of it.
audit: $(STAMP)
	$(PY) -m fluxmoe.kernels.audit

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf $(VENV) $(COMPAT) $(VLLM) $(LLAMA) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
