# Thin targets: the work is done by Python modules (tools/ for the set-up), so that
# everything can be run, tested and read without make.

.DEFAULT_GOAL := help
.PHONY: help python deps deps-test up down dsn psql demo test test-small test-matrix test-faults lint lock bench bench-deferred bench-large train install migrate clean \
	docker-build docker-up docker-down docker-test docker-base
MAKEFLAGS += --no-print-directory

# PL/Python is linked to the distribution's Python: the server's packages must be for that one.
PYTHON ?= /usr/bin/python3
DEV := PYTHONPATH=. $(PYTHON) -m tools
BIN := build/client/bin

# A process per core, each with a server of its own. A file's tests stay together, since they share tables.
# In the order of their names, small files come last, so that no process waits long for another.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

ARGS ?=

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | while IFS="$$(printf '\t')" read -r name text; do printf 'make %-12s %s\n' "$$name" "$$text"; done

# Before anything else is there: Python itself, with venv. The first attempt goes without apt-get update,
# since that takes longer than the rest; it fails where the lists are missing or old.
APT_PYTHON := apt-get install -qq -y --no-install-recommends python3 python3-venv
python:
	@$(PYTHON) -c 'import venv, ensurepip, tomllib' 2>/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "Installing Python (python3 python3-venv) …"; \
	    export DEBIAN_FRONTEND=noninteractive DEBCONF_NOWARNINGS=yes; \
	    $(APT_PYTHON) >/dev/null 2>&1 || { apt-get update -qq && $(APT_PYTHON) >/dev/null; } || { \
	      echo "error: apt-get could not install python3 python3-venv: check the network, then run it again" >&2; exit 1; }; \
	    $(PYTHON) -c 'import venv, ensurepip, tomllib' || { \
	      echo "error: $(PYTHON) must be Python 3.11 or later: set PYTHON" >&2; exit 1; }; \
	  else \
	    echo "error: Python 3.11 or later with venv is missing: apt-get install python3 python3-venv" >&2; exit 1; \
	  fi; }

deps: python ## install what is missing: PostgreSQL, PL/Python, pgvector, Python environments
	@$(DEV).deps

deps-test: python
	@$(DEV).deps --test --train-if-small

up: deps ## start the embedded cluster and make the database (make deps first)
	@$(DEV).embedded up

down: python ## stop the embedded cluster
	@$(DEV).embedded down

dsn: python ## print the embedded cluster's connection string
	@$(DEV).embedded dsn

psql: python ## open the embedded cluster (ARGS='-c "SELECT 1"')
	@$(DEV).embedded psql $(ARGS)

demo: python ## load medical images, search, print the answers and draw them
	@$(DEV).deps --demo
	@$(DEV).embedded up
	@$(BIN)/pg_siamese demo --sheet build/demo/contact_sheet.png --dsn "$$($(DEV).embedded dsn)" $(ARGS)
	@echo "open the same database: make psql"

test: deps-test ## run the tests, on clusters of their own (ARGS='-k name')
	@$(PYTEST) $(ARGS)

test-small: python ## the tests that need no PyTorch, with the smaller environment
	@$(DEV).deps --test
	@$(PYTEST) $(ARGS)

test-matrix: test ## all tests here, and those of the database on PostgreSQL 17 and 18, in containers
	@for major in 17 18; do $(MAKE) docker-test POSTGRES_MAJOR=$$major ARGS="$(ARGS)" || exit; done

test-faults: deps-test ## kill servers, fill disks and damage files, at length (ARGS='--faults-cycles 100 --faults-seed 7')
	@$(BIN)/python -m pytest tests/faults --faults-long -s $(ARGS)

lint: deps-test ## ruff, mypy, import-linter, sqlfluff, codespell, and the language of the docs
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@PYTHONPATH=. $(BIN)/lint-imports --no-cache
	@$(BIN)/sqlfluff lint --disable-progress-bar sql $(wildcard migrations/*--*--*.sql)
	@$(BIN)/codespell
	@$(DEV).prose --comments

bench: python ## measure against pgvector, FAISS and ONNX Runtime at 70,000 images
	@$(DEV).deps --test --bench
	@$(BIN)/python -m bench $(ARGS)

bench-deferred: python ## inserts into deferred collections, and one worker beside two
	@$(DEV).deps --test --bench
	@$(BIN)/python -m bench --deferred $(ARGS)

bench-large: python ## the search and build part at 1,000,000 vectors
	@$(DEV).deps --test --bench
	@$(BIN)/python -m bench --large $(ARGS)

train: python ## train the shipped medical encoder anew, or ARGS="EXPERIMENT ..." (pg_siamese train --help)
	@$(DEV).deps --train
	@$(BIN)/pg_siamese train $(or $(ARGS),medical --output models/medical.onnx)

# Names what is missing, PostgreSQL and venv alike, itself: it needs no more than Python.
install: ## for a DBA: install into the system's PostgreSQL (PG_CONFIG, PREFIX, DESTDIR, CLIENT=no)
	@$(PYTHON) -c 'import tomllib' 2>/dev/null || $(MAKE) python
	@$(DEV).install --pg-config "$(PG_CONFIG)" --prefix "$(PREFIX)" --destdir "$(DESTDIR)" --client "$(CLIENT)"

lock: python ## choose the Python packages' versions and hashes anew (ARGS=--upgrade)
	@$(DEV).lock $(ARGS)

migrate: python ## show versions of the extension and upgrade the embedded database (ARGS='--dsn … --show')
	@$(DEV).migrate $(ARGS)

docker-build: python ## build the image of docker/ (POSTGRES_MAJOR=18, BASE_IMAGE; certificates in docker/certificates/)
	@$(DEV).docker build

docker-up: python ## start the image in a container with a volume (PORT, POSTGRES_PASSWORD)
	@$(DEV).docker up

docker-down: python ## stop that container; ARGS=--volume removes its data too
	@$(DEV).docker down $(ARGS)

docker-test: deps-test ## build, start, test and stop the image (ARGS='tests/docker -k name')
	@$(DEV).docker test $(ARGS)

docker-base: python ## make the image's base from Debian's archive, without a registry
	@$(DEV).docker base

clean: ## stop the embedded cluster and remove build/ with its data
	@if [ -e build ]; then $(DEV).embedded down || true; fi
	@if [ -L build ]; then rm -rf "$$(readlink -f build)"; fi
	@rm -rf build
