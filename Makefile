# One word each. PYTHON is the interpreter of an environment that holds `pip install -e ".[test]"`.
PYTHON ?= python

.PHONY: check test bench

check: # format, lint, types
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m pyrefly check

test: # unit tests beside the modules, whole-engine tests in tests/
	$(PYTHON) -m pytest

bench: # tokens/s and fraction of the roofline, the last line one JSON document
	$(PYTHON) -m roofline bench latency smollm2-135m
