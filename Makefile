# make demo     sets everything up in .venv and runs the example workflow
# make test     sets everything up in .venv and runs every check
# make test-torchforce   runs OpenMM's tests with the real openmmtorch.TorchForce, in .venv-torchforce (8 GB)
# Needs Python 3.11, make and a network (or local packages) only.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP = -m pip --disable-pip-version-check
# torch comes first and by its exact version: that one has a wheel without CUDA packages, and left to itself
# pip would take a newer torch together with several gigabytes of them.
TORCH = $(shell sed -n '/^torch==/p' constraints.txt)
STAMP = .venv/installed.stamp
TORCHFORCE = .venv-torchforce
TORCHFORCE_STAMP = $(TORCHFORCE)/installed.stamp
WHEELS = build/wheels
CLEAN = build/clean-environment

export OMP_NUM_THREADS ?= 1

.PHONY: install test lint types demo wheel test-wheel test-torchforce clean

install: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) install $(TORCH)
	.venv/bin/python $(PIP) install -c constraints.txt -e '.[development]'
	touch $(STAMP)

demo: install
	.venv/bin/flowbridge run examples/alanine_dipeptide.toml

test: install lint types
	.venv/bin/pytest -n 2 --dist worksteal

# The newest published openmmtorch works with one torch only, and with OpenMM 8.6 except for reading XML: a copy of OpenMM
# 8.5 beside is for that. Everything else has the versions of the other environment.
$(TORCHFORCE_STAMP): setup.cfg pyproject.toml constraints.txt
	test -x $(TORCHFORCE)/bin/python || $(PYTHON) -m venv $(TORCHFORCE)
	mkdir -p build
	sed '/^torch==/d' constraints.txt > build/constraints-torchforce.txt
	$(TORCHFORCE)/bin/python $(PIP) install torch==2.9.1 openmmtorch==1.5
	$(TORCHFORCE)/bin/python $(PIP) install -c build/constraints-torchforce.txt torch==2.9.1 \
		-e '.[molecules]' pytest pytest-xdist hypothesis
	rm -rf $(TORCHFORCE)/openmm-8.5
	$(TORCHFORCE)/bin/python $(PIP) install --no-deps --target $(TORCHFORCE)/openmm-8.5 openmm==8.5.2 openmmtorch==1.5
	touch $(TORCHFORCE_STAMP)

test-torchforce: $(TORCHFORCE_STAMP)
	$(TORCHFORCE)/bin/pytest -rs tests/integrations/test_torchforce.py tests/integrations/test_openmm_forces.py

lint: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# A new build folder each time: setuptools would put modules that were deleted since into the wheel. The metadata
# that it leaves in the tree would hide the installed package's from Python started here, and go stale.
wheel: install
	rm -rf build/lib build/bdist.* $(WHEELS)
	.venv/bin/python $(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir $(WHEELS) .
	rm -rf flowbridge.egg-info

types: install
	.venv/bin/mypy -p flowbridge

# What a user gets from the wheel alone, run from a folder that holds nothing.
test-wheel: wheel
	rm -rf $(CLEAN) build/empty
	$(PYTHON) -m venv $(CLEAN)
	mkdir -p build/empty
	$(CLEAN)/bin/python $(PIP) install --quiet $(TORCH)
	$(CLEAN)/bin/python $(PIP) install --quiet -c constraints.txt $(WHEELS)/*.whl
	cd build/empty && ../clean-environment/bin/python -I ../../.ci/smoke_test.py
	cd build/empty && ../clean-environment/bin/flowbridge doctor --quick

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .venv $(TORCHFORCE)
