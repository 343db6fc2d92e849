# Every target first makes .venv and installs alignfast into it, so that a fresh machine needs nothing but
# Python 3.10 or newer and a C++ compiler. PYTHON names another interpreter: `make test PYTHON=python3.12`.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/installed
BUILT := build/built
WHEEL := build/wheel
# So many tests at once, of one thread each: OpenMP's threads wait for each other where cores are shared.
PROCESSES ?= 2
ONE_THREAD := OMP_NUM_THREADS=1
PARALLEL := -q -n $(PROCESSES) --dist worksteal
SOURCES := $(shell find csrc -type f) setup.py

.PHONY: quickstart test test-all check bench lint wheel clean

quickstart: $(BUILT)
	$(VENV)/bin/alignfast quickstart

test: $(BUILT)
	$(ONE_THREAD) $(RUN) -m pytest $(PARALLEL) -m "not slow"

test-all: $(BUILT)
	$(ONE_THREAD) $(RUN) -m pytest $(PARALLEL)

check: lint test wheel

bench: $(BUILT)
	$(RUN) -m pip install -q -c constraints.txt -e ".[bench]" --no-build-isolation
	$(VENV)/bin/alignfast bench --suite full --output build/bench

lint: $(BUILT)
	$(RUN) -m pip install -q -c constraints.txt ruff mypy types-PyYAML
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# The wheel, built in isolation as pip builds it, and its tests from another directory, so that no file of the
# checkout can stand in for one that the wheel lacks. setuptools would copy modules deleted since from build/lib.*.
wheel: $(BUILT)
	$(RUN) -m pip install -q build
	rm -rf $(WHEEL) build/lib.*
	$(RUN) -m build --wheel --outdir $(WHEEL)
	$(RUN) -m pip install -q --no-deps --target $(WHEEL)/site $(WHEEL)/*.whl
	cd $(WHEEL) && PYTHONPATH=$(CURDIR)/$(WHEEL)/site $(CURDIR)/$(RUN) -c "import alignfast as a; assert '$(WHEEL)' in a.__file__, a.__file__"
	cd $(WHEEL) && $(ONE_THREAD) PYTHONPATH=$(CURDIR)/$(WHEEL)/site $(CURDIR)/$(VENV)/bin/pytest $(PARALLEL) -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) -m "not slow" $(CURDIR)/tests

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "alignfast needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q --upgrade pip "setuptools>=80"
	$(RUN) -m pip install -q -c constraints.txt torch cmake ninja pybind11
	$(RUN) -m pip install -q --no-build-isolation -c constraints.txt -e ".[test]"
	@touch $@

# A changed source is compiled alone; pip has built the first time.
$(BUILT): $(INSTALLED) $(SOURCES)
	$(RUN) setup.py -q build_ext --inplace
	@mkdir -p build && touch $@

clean:
	rm -rf build dist *.egg-info alignfast/*.so
