# The commands of this project. `make help` lists them. They need Python 3.11 or newer and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Only locked packages are installed, each verified by its hash.
PIP := -m pip install --disable-pip-version-check --require-hashes --compile
COMPILE := uv pip compile -q --upgrade --universal --python-version 3.11 --generate-hashes --no-header \
	--no-emit-index-url

# The programs that `make bench` measures, each in its own environment. `litellm` is possible, too.
# Debian's Python and the official images' are built with profile-guided optimisation; one that pyenv
# compiled is about a quarter slower.
PEERS ?= service 0.1.0 ferro
BENCH_PYTHON ?= $(firstword $(wildcard /usr/bin/python3) $(PYTHON))
# The commit of version 0.1.0.
BASELINE := 3da361a
# A network namespace of its own, because one of the peers listens on all interfaces.
ALONE := unshare $(if $(filter-out 0,$(shell id -u)),--map-root-user) --net sh -c \
	'ip link set lo up && ulimit -n 8192 && exec "$$@"' bench

.PHONY: help run test test-all test-client soak fuzz bench check audit openapi docs screenshots lock clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

run: $(VENV)/run ## serve on 127.0.0.1:8000 with the settings in .env
	@exec $(BIN)/python -m service

test: $(VENV)/dev ## run the tests that need only Python
	@$(BIN)/coverage erase
	@$(BIN)/coverage run -m pytest -q -n 2 -m "not slow"
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report

test-all: $(VENV)/all ## run the tests that need other programs, a browser or many minutes
	@$(BIN)/python -m pytest -q -n 2 -m slow --ignore tests/test_container.py \
		--ignore tests/test_redis_state.py --ignore tests/test_stores.py
	@$(BIN)/coverage erase
	@$(BIN)/coverage run --source redis_state -m pytest -q -n 2 -m slow tests/test_redis_state.py tests/test_stores.py
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report --include redis_state.py
	@$(BIN)/python -m pytest -q tests/test_container.py # all of them share one image

test-client: $(VENV)/dev ## test a client against every outcome: CLIENT='node examples/client.mjs'
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tools.check_client $(CLIENT)

soak: $(VENV)/dev ## run 20,000 chats with random faults, disconnects and slow readers; 4 minutes
	@$(BIN)/python -m tests.soak

fuzz: $(VENV)/dev ## send malformed requests for 5 minutes
	@$(BIN)/python -m tests.fuzz

bench: $(VENV)/run $(PEERS:%=$(VENV)-bench/%/ready) ## measure the service beside its peers; 25 minutes; BENCH='--rounds 1 --loads burst'
	@$(ALONE) $(BIN)/python -m bench $(BENCH)

check: $(VENV)/dev ## check format, lint, types and the deployment files
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy .
	@$(BIN)/hadolint deploy/Dockerfile
	@$(BIN)/kubernetes-validate --strict --quiet deploy/kubernetes.yaml

audit: $(VENV)-audit/ready ## check the locked packages for known vulnerabilities; write sbom.cdx.json
	@$(VENV)-audit/bin/cyclonedx-py requirements requirements/run.txt --output-reproducible -o sbom.cdx.json
	@$(VENV)-audit/bin/pip-audit -r requirements/run.txt --require-hashes --disable-pip

openapi: $(VENV)/dev ## write static/openapi.json
	@$(BIN)/python -m tools.openapi

docs: openapi ## write .env.example, static/openapi.json and the generated tables in docs/
	@$(BIN)/python -m tools.docs

screenshots: $(VENV)/all ## take the screenshots of the playground in docs/
	@$(BIN)/python -m tests.screenshots

lock: ## upgrade and lock all packages in requirements/; needs uv
	$(COMPILE) pyproject.toml -o requirements/run.txt
	$(COMPILE) --group test --group check -c requirements/run.txt -o requirements/dev.txt
	$(COMPILE) --group test-all -c requirements/run.txt -c requirements/dev.txt \
		-o requirements/test-all.txt
	$(COMPILE) --group audit -o requirements/audit.txt
	for peer in ferro litellm; do \
		$(COMPILE) --group bench-$$peer -o requirements/bench-$$peer.txt || exit; done

clean: ## remove environments, caches and reports
	rm -rf $(VENV) $(VENV)-audit $(VENV)-bench sbom.cdx.json .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Install the last prerequisite, a lock file, and print how many of its packages pip has fetched. At a
# terminal one line is overwritten. pip's errors go to stderr.
define INSTALL
@echo "Installing the packages of $(lastword $^) into $(VENV)"
@{ PYTHONUNBUFFERED=1 $(BIN)/python $(PIP) --progress-bar off -r $(lastword $^) || echo Failed; } \
	| awk -v total=$$(grep -c '^[a-z].*==' $(lastword $^)) -v terminal=$$(test -t 2 && echo yes) ' \
	BEGIN { end = terminal ? "\033[K\r" : "\n" } \
	/\(from -r |^Ignoring/ { name = $$2 == "already" ? $$4 : $$2; sub(/.*\//, "", name); \
		sub(/(==|-[0-9]|:).*/, "", name); printf "  %d of %d: %s%s", ++count, total, name, end } \
	/^Installing/ { printf "  unpacking and compiling%s", end } \
	/^Failed$$/ { exit 1 } \
	{ fflush() } END { if (terminal) printf "\033[K" }'
@touch $@
endef

# Each stamp is newer than its lock file once that is installed.
$(VENV)/run: requirements/run.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "chat-sidecar needs Python 3.11 or newer: set PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL)

$(VENV)/dev: $(VENV)/run requirements/dev.txt
	$(INSTALL)

$(VENV)/all: $(VENV)/dev requirements/test-all.txt
	$(INSTALL)

$(VENV)-audit/ready: requirements/audit.txt
	@$(PYTHON) -m venv $(VENV)-audit
	@$(VENV)-audit/bin/python $(PIP) --quiet -r $<
	@touch $@

# --no-deps: the lock files are complete, and pip before 25 may resolve an extra to another version.
define INSTALL_MEASURED
@echo "Installing $(notdir $(@D)) for the benchmark"
@$(BENCH_PYTHON) -m venv $(@D)
@$(@D)/bin/python $(PIP) --quiet --no-deps -r $(or $<,$(@D)/source/requirements.txt) && touch $@ \
	|| { echo "Could not install $(notdir $(@D)); the benchmark omits it." && rm -r $(@D); }
endef
$(VENV)-bench/service/ready: requirements/run.txt
	$(INSTALL_MEASURED)
$(VENV)-bench/0.1.0/ready:
	@mkdir -p $(@D)/source
	@git archive $(BASELINE) | tar -x -C $(@D)/source || true
	$(INSTALL_MEASURED)
$(VENV)-bench/%/ready: requirements/bench-%.txt
	$(INSTALL_MEASURED)
