PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.DEFAULT_GOAL := help
.SILENT:
.PHONY: help run test test-fast test-image lint format bench screenshots dist pyz lock clean

help: ## List the targets
	sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

run: $(VENV)/runtime ## Run the gateway: OpenAI if OPENAI_API_KEY is set, else a demonstration
	exec $(RUN) redbtc_proxy.py serve --first-run --demo-if-no-key

test: $(VENV)/dev tests/node_modules lint ## Check style and types, run all tests
	$(RUN) -m pytest --numprocesses 4 --dist worksteal

test-fast: $(VENV)/dev ## Run in a minute the tests that start no process, and some that do
	$(RUN) -m pytest --numprocesses 2 --dist worksteal -m "not slow and (front_door or not process)"

test-image: $(VENV)/dev ## Build the container image and run it (needs root, buildah and debootstrap)
	$(RUN) -m pytest tests/product/image.py

lint: $(VENV)/dev ## Check style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(VENV)/dev ## Put the code in its usual form
	$(RUN) -m ruff check --fix . || true
	$(RUN) -m ruff format .

bench: $(VENV)/dev ## Repeat the measurements that README and docs quote (needs nginx; installs LiteLLM)
	$(RUN) bench/bench.py
	$(RUN) bench/backup.py
	$(RUN) bench/failover.py
	$(RUN) bench/reload.py

screenshots: $(VENV)/dev ## Take pictures of every page of the dashboard (needs Chromium)
	$(RUN) -m tests.dashboard.screenshots

dist: $(VENV)/dev ## Build the sdist and the wheel into dist/, the same bytes for the same commit
	$(RUN) -m packing.dist

pyz: $(VENV)/dev ## Build dist/redbtc-proxy.pyz, one file with all dependencies
	$(RUN) -m packing.pyz

lock: ## Pin the newest versions of all dependencies, with their hashes
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/pip install --quiet uv
	$(VENV)-lock/bin/uv pip compile --quiet --universal --generate-hashes --no-header \
		--upgrade pyproject.toml -o requirements.lock
	$(VENV)-lock/bin/uv pip compile --quiet --universal --generate-hashes --no-header \
		--constraints requirements.lock --group dev pyproject.toml -o requirements-dev.lock
	rm -rf $(VENV)-lock

clean: ## Remove what was built; databases stay
	rm -rf $(VENV) $(VENV)-litellm tests/node_modules build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/runtime: requirements.lock | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	touch $@

$(VENV)/dev: requirements-dev.lock | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check --require-hashes \
		-r requirements-dev.lock
	touch $@ $(VENV)/runtime

tests/node_modules: tests/package-lock.json
	if command -v npm >/dev/null; then cd tests && npm ci --silent; \
	else echo "no npm: the tests with Node and Codex CLI will be skipped"; mkdir -p node_modules; fi
	touch $@
