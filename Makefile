# make demo   the whole way from pictures to a verdict over HTTP, on this machine
# make test   everything the tests need, then all tests
# make soak   the long proofs that `make test` has in a short form
# make lint   linter, formatter, type checker
# make bench  Kensa beside others, each in an environment of its own: the first time it downloads 4 GB
#             into pip's cache and builds 20 GB in ~/.cache/kensa-peers; then it takes 10 minutes
# make browser  Chromium for the tests of the screen, where it is missing and can be had

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test soak lint bench browser clean

# One environment; a marker per set of extras says that pyproject.toml has not changed since.
$(VENV)/train: extras = train
$(VENV)/dev: extras = train,dev
$(VENV)/train $(VENV)/dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[$(extras)]'
	touch $@

demo: $(VENV)/train
	$(BIN)/python -m workers.demo $(ARGS)

test: $(VENV)/dev browser lint
	$(BIN)/python -m pytest -m 'not soak' --numprocesses 3 --dist loadfile --no-loadscope-reorder $(ARGS)

soak: $(VENV)/dev browser
	$(BIN)/python -m pytest -m soak $(ARGS)

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/train
	$(BIN)/python -m benchmarks.peers $(ARGS)

# The tests of the screen need one, which no Python package brings; without it they are skipped.
browser:
	@for name in chromium chromium-browser google-chrome-stable google-chrome; do \
	  command -v $$name >/dev/null && exit; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y \
	    --no-install-recommends chromium fonts-ipafont-gothic >/dev/null; \
	else echo "No Chromium here: the tests of the screen are skipped (apt-get install chromium)"; fi

clean:
	rm -rf $(VENV) build *.egg-info
