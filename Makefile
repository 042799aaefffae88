# make test      lint, then every test; without a GPU the kernels run in Triton's interpreter
# make check     lint, types, and the values of every norm, layout and direction: for between two edits
# make networks  models of transformers and diffusers taken over, in an environment that has these
# make bench     the benchmark
# make lint      ruff and mypy
# make versions  compilation and the fast tests with several versions of Triton and PyTorch (VERSIONS="3.6 2.9": with these)
# make spills    compile 200 random calls for three devices that are not there: which of their kernels spill registers
# make mutants   one operator changed at a time, in a copy: which changes no test notices
# make clean     remove the virtual environments and everything built
# Needs Python >= 3.10 with venv, git and make; the rest is installed into .venv.

PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: test check networks bench lint versions spills mutants clean

# by file: what a module prepares for its tests, one process prepares; in order, so that the long files do not come last
test: .venv/.stamp
	@echo "lint, then every test: about 10 minutes on 2 cores"
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q

check: .venv/.stamp
	@echo "lint, types, and the values of every norm, layout and direction: about a minute on 2 idle cores"
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile -q tests/test_values.py tests/test_layout.py tests/test_layering.py

networks: .venv/.stamp
	$(BIN)/pip install -q -c constraints.txt -e '.[models]'
	$(BIN)/python -m pytest -n 2 -q tests/test_networks.py

bench: .venv/.stamp
	$(BIN)/python -m bench

lint: .venv/.stamp
	$(BIN)/ruff check .
	$(BIN)/mypy

versions:
	$(PYTHON) tests/versions.py $(VERSIONS)

spills: .venv/.stamp
	$(BIN)/python -m tests.spills

mutants: .venv/.stamp
	$(BIN)/python -m tests.mutants

# torch first and at exactly the tested version, so that nothing later chooses another one
.venv/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r constraints.txt
	$(BIN)/pip install -q -c constraints.txt -e '.[test,bench]'
	touch $@

clean:
	rm -rf .venv .venv-[0-9]* build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find normops kernels bench tests -name __pycache__ -type d -prune -exec rm -rf {} +
