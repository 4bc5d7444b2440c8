# Two commands: `make demo` and `make test`. Both set up what they need, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
# uv leaves packages uncompiled, so Python's cache of compiled modules has to be on: without it every process that a test starts
# compiles torch anew. Empty is not set.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test long mutants lint types setup clean

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

test: lint types
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

# Hours: 100,000 hostile files, and 200 random campaigns of crashes.
long: $(VENV)/.installed
	$(BIN)/python tools/fuzz.py --count 100000
	$(BIN)/python tools/crash_campaign.py --campaigns 200

# Hours: every small change of the privacy core must be noticed by a test, or be in docs/mutation-equivalents.toml. mutmut is for this alone.
mutants: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt mutmut==3.8.1
	$(BIN)/python tools/mutation.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy --strict src/dpdistill/privacy src/dpdistill/mechanisms

setup: $(VENV)/.installed

# uv takes seconds where pip takes minutes; where it cannot be had, pip does the same. uv does not read pip's own settings, so a
# local wheel folder that pip knows (for a CPU build of torch, say) is passed on.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt uv || true
	if test -x $(BIN)/uv; then \
	  UV_FIND_LINKS="$${UV_FIND_LINKS:-$$($(BIN)/python -m pip config get global.find-links 2>/dev/null || true)}" \
	  $(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt -e '.[dev]'; \
	else $(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'; fi
	touch $@

clean:
	rm -rf out .pytest_cache .mypy_cache .ruff_cache .hypothesis
