# The commands of this project; `make help` lists them. All they need is Python 3.11+ and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# No packages come from anywhere but the locked files, and each is checked against its hash.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --compile

COMPILE := uv pip compile -q --upgrade --universal --python-version 3.11 --generate-hashes --no-header \
	--no-emit-index-url

# What is measured, each in an environment of its own, on a Python that is built for speed: Debian's
# and the official images' are, one that pyenv compiled on the spot is a quarter slower.
PEERS := service fastapi ferro litellm
BENCH_PYTHON ?= $(firstword $(wildcard /usr/bin/python3) $(PYTHON))
# In a network of its own, for one of the peers listens on all interfaces.
ALONE := unshare $(if $(filter-out 0,$(shell id -u)),--map-root-user) --net sh -c \
	'ip link set lo up && ulimit -n 8192 && exec "$$@"' bench

.PHONY: help run test test-all soak fuzz bench bench-growth check rehearse audit openapi docs screenshots lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

run: $(VENV)/run ## serve on 127.0.0.1:8000, with the settings in .env
	@exec $(BIN)/python -m service

test: $(VENV)/dev ## the tests that need nothing but Python
	@$(BIN)/coverage erase
	@$(BIN)/coverage run -m pytest -q -n 2 -m "not slow"
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report

test-all: $(VENV)/all ## the tests that take real servers, a browser or many minutes
	@$(BIN)/python -m pytest -q -n 2 -m slow --ignore tests/test_container.py \
		--ignore tests/test_redis_state.py --ignore tests/test_stores.py
	@$(BIN)/coverage erase
	@$(BIN)/coverage run --source redis_state -m pytest -q -n 2 -m slow tests/test_redis_state.py tests/test_stores.py
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report --include redis_state.py
	@$(BIN)/python -m pytest -q tests/test_container.py # all of them share one image

soak: $(VENV)/dev ## 20,000 chats with faults, leavings and slow readers; over three minutes
	@$(BIN)/python -m tests.soak

fuzz: $(VENV)/dev ## malformed requests for five minutes
	@$(BIN)/python -m tests.fuzz

bench: $(VENV)/run $(PEERS:%=$(VENV)-bench/%/ready) ## the service beside its peers; 20 minutes; BENCH='--rounds 1 --cases burst'
	@$(ALONE) $(BIN)/python -m bench $(BENCH)

bench-growth: $(VENV)/run $(VENV)-bench/service/ready ## what more streams, sessions, callers cost; 4 minutes
	@$(ALONE) $(BIN)/python -m bench.growth $(BENCH)

check: $(VENV)/dev ## format, lint, types, and what deploy/ holds
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy .
	@$(BIN)/hadolint deploy/Dockerfile
	@$(BIN)/kubernetes-validate --strict --quiet deploy/kubernetes.yaml

rehearse: $(VENV)/dev ## run a client against every ending: CLIENT='node examples/ask.mjs'
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tools.rehearse $(CLIENT)

audit: $(VENV)-audit/ready ## ask for known weaknesses of the locked packages; write sbom.cdx.json
	@$(VENV)-audit/bin/python -m tools.audit

openapi: $(VENV)/dev ## write static/openapi.json from the models
	@$(BIN)/python -m tools.openapi

docs: openapi ## that, .env.example and the tables of the README
	@$(BIN)/python -m tools.readme

screenshots: $(VENV)/all ## take the README's pictures of the page anew
	@$(BIN)/python -m tests.screenshots

lock: ## upgrade and lock the dependencies of pyproject.toml in requirements/; needs uv
	$(COMPILE) pyproject.toml -o requirements/run.txt
	$(COMPILE) --group test --group check -c requirements/run.txt -o requirements/dev.txt
	$(COMPILE) --group test-all -c requirements/run.txt -c requirements/dev.txt \
		-o requirements/test-all.txt
	$(COMPILE) --group audit -o requirements/audit.txt
	for peer in $(filter-out service,$(PEERS)); do \
		$(COMPILE) --group bench-$$peer -o requirements/bench-$$peer.txt || exit; done

clean: ## remove what the commands above made
	rm -rf $(VENV) $(VENV)-audit $(VENV)-bench sbom.cdx.json .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Each stamp is newer than its lock file once that is installed; a second call finds nothing to do.
$(VENV)/run: requirements/run.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "chat-sidecar needs Python 3.11 or newer; set PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the locked requirements into $(VENV) ..."
	@$(INSTALL) -r requirements/run.txt
	@touch $@

$(VENV)-audit/ready: requirements/audit.txt
	@$(PYTHON) -m venv $(VENV)-audit
	@$(VENV)-audit/bin/python -m pip install --quiet --require-hashes -r requirements/audit.txt
	@touch $@

define INSTALL_MEASURED
@echo "Installing $(notdir $(@D)) to be measured ..."
@$(BENCH_PYTHON) -m venv $(@D)
@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --compile \
	-r $< && touch $@ || echo "$(notdir $(@D)) can't be installed, and will be reported missing."
endef
$(VENV)-bench/service/ready: requirements/run.txt
	$(INSTALL_MEASURED)
$(VENV)-bench/%/ready: requirements/bench-%.txt
	$(INSTALL_MEASURED)

$(VENV)/dev: $(VENV)/run requirements/dev.txt
	@echo "Installing the test tools ..."
	@$(INSTALL) -r requirements/dev.txt
	@touch $@

$(VENV)/all: $(VENV)/dev requirements/test-all.txt
	@echo "Installing what more test-all needs ..."
	@$(INSTALL) -r requirements/test-all.txt
	@touch $@
