# Each target does all its own set-up: python3, make and pip are enough.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: install demo test test-all test-oldest check bench study real docs docs-serve clean

install: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	ln -sfn .. .venv/mmaudit
	touch $@

demo: $(READY)
	$(BIN)/mmaudit demo

test: $(READY)
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

# What `make test` has no time for as well, and more examples of each property: half an hour.
test-all: $(READY)
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --hypothesis-profile=thorough

# The same as `make test`, with the lower bounds of pyproject.toml.
test-oldest: .venv-oldest/.ready
	.venv-oldest/bin/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

.venv-oldest/.ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e ".[dev]"
	touch $@

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p mmaudit.audit -p mmaudit.rebalance -p mmaudit.train -p mmaudit.cli
	$(BIN)/mypy tests benchmarks .ci/language.py
	$(BIN)/lint-imports
	$(BIN)/python .ci/language.py

# Half an hour on a quiet machine, and 12 GB on disk; see benchmarks/README.md.
bench: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	$(BIN)/python benchmarks/probe.py
	$(BIN)/python benchmarks/mixture.py
	$(BIN)/python benchmarks/encode.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/balanced.py
	$(BIN)/python benchmarks/coverage.py
	$(BIN)/python benchmarks/honesty.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/resnet.py

# The real data sets are not part of the project: DATA names the folder that holds them.
real: $(READY)
	$(BIN)/python benchmarks/real.py $(DATA)

# All methods and controls on the demo set and on two of them, into docs/study-results.md: under an hour on two quiet
# cores. An interrupted study goes on where it was.
study: $(READY)
	$(BIN)/python benchmarks/study.py $(DATA) --page docs

# The site, into docs/_build/html; warnings are errors. Python 3.11 or later.
docs: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

docs-serve: docs
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory docs/_build/html 8000

clean:
	rm -rf docs/_build docs/reference/_generated .venv .venv-oldest build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
