# make demo       sets up what running needs, and runs the example workflow
# make check      lint, types and the fast tests
# make test       lint, types and every test that needs no GPU
#                 (COVERAGE=yes: with the share of lines that they run)
# make test-wheel         what a user gets from the wheel
# make test-torchforce    OpenMM's tests with the real openmmtorch.TorchForce, in .venv-torchforce (8 GB)
# Another Python: make test PYTHON=python3.13 (3.11 is what is tested). It gets an environment of its own.
# Needs Python, make and a network (or local packages) only.

ifdef PYTHON
VENV = .venv-$(notdir $(PYTHON))
else
PYTHON := $(shell command -v python3.11 || command -v python3)
VENV = .venv
endif
BIN = $(VENV)/bin
DEMO = $(VENV)-demo
PIP = -m pip --disable-pip-version-check
# torch comes first and by its exact version: that one has a wheel without CUDA packages, and left to itself
# pip would take a newer torch together with several gigabytes of them.
TORCH = $(shell sed -n '/^torch==/p' constraints.txt)
STAMP = $(VENV)/installed.stamp
DEMO_STAMP = $(DEMO)/installed.stamp
TORCHFORCE = .venv-torchforce
TORCHFORCE_STAMP = $(TORCHFORCE)/installed.stamp
REQUIREMENTS = setup.cfg pyproject.toml constraints.txt
DISTRIBUTIONS = build/distributions
CLEAN = build/clean-environment
PYTEST = $(BIN)/pytest -n 2 --dist worksteal

export OMP_NUM_THREADS ?= 1

.PHONY: install demo check test slow-tests lint types fast wheel test-wheel test-torchforce clean

install: $(STAMP)

# The metadata that setuptools leaves in the tree would hide the installed package's from Python started here, and go stale.
$(STAMP): $(REQUIREMENTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) install $(TORCH)
	$(BIN)/python $(PIP) install -c constraints.txt -e '.[development]'
	rm -rf flowbridge.egg-info
	touch $@

$(DEMO_STAMP): $(REQUIREMENTS)
	test -x $(DEMO)/bin/python || $(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/python $(PIP) install $(TORCH)
	$(DEMO)/bin/python $(PIP) install -c constraints.txt -e .
	rm -rf flowbridge.egg-info
	touch $@

demo: $(DEMO_STAMP)
	$(DEMO)/bin/flowbridge run examples/alanine_dipeptide.toml

check: install
	$(MAKE) --no-print-directory -j 3 lint types fast

fast: install
	$(PYTEST) -m "not slow"

test: install lint types
	$(PYTEST) $(if $(COVERAGE),--cov --cov-report=term:skip-covered)

# Measures which tests are slow: tests/slow_tests.txt. On a machine that does nothing else.
slow-tests: install
	$(PYTEST) --measure-slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy -p flowbridge

# The newest published openmmtorch works with one torch only, and with OpenMM 8.6 except for reading XML: a copy of OpenMM
# 8.5 is for that. Everything else has the versions of the other environment.
$(TORCHFORCE_STAMP): $(REQUIREMENTS)
	test -x $(TORCHFORCE)/bin/python || $(PYTHON) -m venv $(TORCHFORCE)
	mkdir -p build
	sed '/^torch==/d' constraints.txt > build/constraints-torchforce.txt
	$(TORCHFORCE)/bin/python $(PIP) install torch==2.9.1 openmmtorch==1.5
	$(TORCHFORCE)/bin/python $(PIP) install -c build/constraints-torchforce.txt torch==2.9.1 \
		-e '.[molecules]' pytest pytest-xdist hypothesis
	rm -rf $(TORCHFORCE)/openmm-8.5
	$(TORCHFORCE)/bin/python $(PIP) install --no-deps --target $(TORCHFORCE)/openmm-8.5 openmm==8.5.2 openmmtorch==1.5
	touch $@

test-torchforce: $(TORCHFORCE_STAMP)
	$(TORCHFORCE)/bin/pytest -rs tests/integrations/test_torchforce.py tests/integrations/test_openmm_forces.py

# The wheel is built from the sdist, which shows that both hold everything.
wheel: install
	rm -rf $(DISTRIBUTIONS)
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('$(DISTRIBUTIONS)')" > /dev/null
	$(BIN)/python $(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir $(DISTRIBUTIONS) $(DISTRIBUTIONS)/*.tar.gz
	rm -rf flowbridge.egg-info

# What a user gets from the wheel alone, run from a folder that holds nothing.
test-wheel: wheel
	rm -rf $(CLEAN) build/empty
	$(PYTHON) -m venv $(CLEAN)
	mkdir -p build/empty
	$(CLEAN)/bin/python $(PIP) install --quiet $(TORCH)
	$(CLEAN)/bin/python $(PIP) install --quiet -c constraints.txt $(DISTRIBUTIONS)/*.whl
	cd build/empty && ../clean-environment/bin/python -I ../../.ci/smoke_test.py
	cd build/empty && ../clean-environment/bin/flowbridge doctor --quick

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .coverage .venv .venv-*
