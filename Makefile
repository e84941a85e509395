# make demo   the whole way from pictures to a verdict over HTTP, on this machine
# make test   everything the tests need, then all tests
# make soak   the long proofs that `make test` has in a short form
# make lint   linter, formatter, type checker
# make bench  the benchmarks

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test soak lint bench clean

# One environment; a marker per set of extras says that pyproject.toml has not changed since.
$(VENV)/train: extras = train
$(VENV)/dev: extras = train,dev
$(VENV)/train $(VENV)/dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[$(extras)]'
	touch $@

demo: $(VENV)/train
	$(BIN)/python -m workers.demo $(ARGS)

test: $(VENV)/dev lint
	$(BIN)/python -m pytest -m 'not soak' --numprocesses 3 --dist loadfile $(ARGS)

soak: $(VENV)/dev
	$(BIN)/python -m pytest -m soak $(ARGS)

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/train
	$(BIN)/python -m benchmarks.latency $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info
