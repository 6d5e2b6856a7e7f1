# Each target stands on its own: it makes .venv from requirements.lock first, if that is not there yet.
# With uv on PATH that takes seconds; without it, plain `python3 -m venv` and pip read the same lock.

BIN := .venv/bin
STAMP := .venv/.installed
DIR ?= var/up
SEEDS ?= 10000
CHAOS ?=

.DELETE_ON_ERROR:
.PHONY: help setup demo up test test-long test-kafka check bench simulate chaos lock clean

help:            ## this list
	@sed -n 's/^\([a-z-]*\): .*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

setup: $(STAMP)  ## make .venv and install everything into it

demo: $(STAMP)   ## show the main job on embedded services, from nothing
	$(BIN)/metering demo

up: $(STAMP)     ## run broker, Redis, ClickHouse and the flows in DIR (default var/up) until Ctrl-C
	$(BIN)/metering up --dir $(DIR)

# Worlds that are killed, restarted, rebuilt and grown again and again: minutes of CPU each.
LONG_TESTS := $(addprefix tests/e2e/test_,abuse.py chaos.py repair.py restart.py workers.py) \
	$(addprefix tests/integration/test_,rescaling.py upgrade.py)

test: $(STAMP)   ## the tests, on embedded services
	$(BIN)/pytest -n 2 --dist loadfile $(addprefix --ignore=,$(LONG_TESTS))

test-long: $(STAMP) ## the rest of the tests: repairs, restarts, rescaling, abuse, chaos; some 15 minutes
	$(BIN)/pytest $(LONG_TESTS)

# Those in which it matters most which broker it is. METERING_TEST_BROKER=apache runs any other one on it too.
KAFKA_TESTS := tests/apache tests/e2e/test_main_job.py tests/clients/test_node_broker.py \
	$(addprefix tests/integration/test_,kafka_source.py migrate.py emit.py settlement_service.py)

test-kafka: $(STAMP) ## the tests of what a broker does, on Apache Kafka (needs Java, fetches Kafka)
	METERING_TEST_BROKER=apache $(BIN)/pytest -n 2 --dist loadfile $(KAFKA_TESTS)

check: $(STAMP)  ## formatting, lint, types, the direction of imports, and whether the exported schemas are current
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest tests/unit/test_export.py

bench: $(STAMP)  ## throughput and latency, on this machine
	$(BIN)/python -m bench

simulate: $(STAMP) ## settlement under crashes in one process, SEEDS worlds (default 10000)
	$(BIN)/python -m simulation --seeds $(SEEDS)

chaos: $(STAMP)  ## kill every process of real servers under load and compare the books (needs Java; CHAOS=options)
	$(BIN)/python -m chaos $(CHAOS)

lock: $(STAMP)   ## resolve requirements.lock anew from pyproject.toml
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --generate-hashes \
		--no-emit-index-url --no-emit-find-links --upgrade -o requirements.lock

clean:           ## remove what the other targets made, .venv too
	rm -rf .venv var .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info

# A candidate counts only if it runs and can make a venv: a version manager's shim may be on PATH and fail.
$(STAMP): requirements.lock pyproject.toml
	@set -eu; \
	uv=$$(command -v uv || true); \
	if [ -z "$$uv" ] && [ -x $(BIN)/uv ]; then uv=$(BIN)/uv; fi; \
	if ! $(BIN)/python -c '' 2>/dev/null; then \
		python=; \
		for candidate in python3.12 python3.11 python3; do \
			if $$candidate -c 'import ensurepip, platform, sys, venv; \
sys.exit(platform.python_implementation() != "CPython" or not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
				2>/dev/null; then python=$$candidate; break; fi; \
		done; \
		if [ -z "$$python" ] && [ -z "$$uv" ]; then \
			echo "make: no CPython 3.11 or 3.12 with venv found (tried python3.12, python3.11, python3)." >&2; \
			echo "make: install one of them (Debian: apt install python3 python3-venv), or uv." >&2; \
			exit 1; \
		fi; \
		rm -rf .venv; \
		if [ -n "$$uv" ]; then "$$uv" venv --quiet --python "$${python:-3.12}" .venv; \
		else $$python -m venv .venv; fi; \
	fi; \
	if [ -n "$$uv" ]; then \
		VIRTUAL_ENV=.venv "$$uv" pip install --require-hashes -r requirements.lock; \
		VIRTUAL_ENV=.venv "$$uv" pip install --no-deps -e .; \
	else \
		$(BIN)/python -m pip install --disable-pip-version-check --quiet --require-hashes -r requirements.lock; \
		$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps -e .; \
	fi
	@touch $@
