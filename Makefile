# One word each. PYTHON is the interpreter of an environment that holds `pip install -e ".[test]"`.
PYTHON ?= python

.PHONY: check test bench native sanitize

check: # format, lint, types
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m pyrefly check

test: # unit tests beside the modules, whole-engine tests in tests/
	$(PYTHON) -m pytest

bench: # tokens/s and fraction of the roofline, the last line one JSON document
	$(PYTHON) -m roofline bench latency smollm2-135m

native: # the kernels into the source tree, where they are found first
	cmake -S . -B build/native
	cmake --build build/native --parallel
	cmake --install build/native --prefix .

sanitize: # every kernel at random sizes on many threads, under the compiler's sanitizers
	for kind in address,undefined thread; do \
		cmake -S . -B build/$$kind -D ROOFLINE_SANITIZE=$$kind && \
		cmake --build build/$$kind --parallel --target sanitize && \
		build/$$kind/sanitize || exit 1; \
	done
