# Targets that need .venv make it first if it is missing or out of date.
PYTHON ?= python3
# Without a GPU, a CPU build of torch saves gigabytes: set this to an index that has one.
TORCH_INDEX_URL ?=
NAME ?= fashion
VERSION ?= challenger
ARGS ?=

BIN := .venv/bin
# Two stamps of .venv: Convoy and its dependencies are installed; so are the developers' tools.
INSTALLED := .venv/.installed
DEV := .venv/.dev
# Other projects' clients, which the end-to-end tests run unmodified.
OTHER_CLIENTS := .venv-clients/.installed
INSTALL := $(BIN)/python deploy/install.py
# The client is a separate distribution in this repository; no package index has it.
CLIENT := -e clients/python
COMPOSE ?= docker-compose

.DEFAULT_GOAL := help
.PHONY: help demo train promote serve test test-all coverage check torture torture-short chaos proto sbom bench up down update upgrade backup restore test-containers clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

$(INSTALLED): pyproject.toml clients/python/pyproject.toml constraints.txt
	@echo "Installing Convoy into .venv, once: torch, then a hundred smaller packages."
	@$(PYTHON) -m venv .venv
	@$(INSTALL) $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) torch
	@$(INSTALL) $(CLIENT) -e '.[service,training,onnxruntime]'
	@touch $@

$(DEV): $(INSTALLED)
	@echo "Installing the developers' tools into .venv, once."
	@$(INSTALL) $(CLIENT) -e '.[dev]'
	@touch $@

$(OTHER_CLIENTS): tests/e2e/programs/requirements.txt
	@echo "Installing the clients of other projects into .venv-clients, once."
	@$(PYTHON) -m venv .venv-clients
	@.venv-clients/bin/pip install --quiet --disable-pip-version-check -r $<
	@touch $@

demo: $(INSTALLED) ## train, promote, serve, classify one picture (CONVOY_DEMO_ONCE=1: then stop)
	@$(BIN)/python deploy/demo.py

train: $(INSTALLED) ## train and register a version: ARGS='--data folder:PATH --recipe resnet'
	$(BIN)/convoy train $(ARGS)

promote: $(INSTALLED) ## make a version the champion: NAME=fashion VERSION=challenger
	$(BIN)/convoy promote $(NAME) $(VERSION) $(ARGS)

serve: $(INSTALLED) ## follow the registry and serve on http://127.0.0.1:8080
	$(BIN)/convoy serve $(ARGS)

test: $(DEV) ## run all tests except the slow ones, one process per core (at most 4)
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal $(ARGS)

test-all: $(DEV) $(OTHER_CLIENTS) ## run also the slow and the end-to-end tests, as CI does
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal \
	    -m 'not torture and not containers' $(ARGS)

coverage: ## run test-all and measure the code's coverage (takes nearly twice as long)
	@$(MAKE) test-all ARGS='--cov --cov-report=term $(ARGS)'

check: $(DEV) ## check formatting, lint, types, English, secrets and commit subjects
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python deploy/check_english.py
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive convoy registry service training clients/python
	git ls-files -z | xargs -0 $(BIN)/detect-secrets-hook --exclude-lines 'secret_file = '
	@git log --since=2026-11-30T12:00Z --format=%s | awk 'length > 72 { print "over 72 characters: " $$0; found = 1 } \
	    END { exit found }'

torture: $(DEV) ## fail every call to the registry, the disk and torch in turn (long)
	$(BIN)/python -m pytest -m torture tests/torture $(ARGS)

torture-short: $(DEV) ## torture with some of the calls, as CI does (a minute)
	TORTURE=short $(BIN)/python -m pytest -m torture tests/torture $(ARGS)

chaos: $(DEV) ## run all failure scenarios of docs/reliability.md (over an hour)
	@$(INSTALL) $(CLIENT) -e '.[bench,chaos]'
	$(BIN)/python -m benchmarks.chaos all --json benchmarks/results/chaos --picture docs/pictures

proto: $(DEV) ## write the Python modules of the gRPC messages
	$(BIN)/python -m grpc_tools.protoc -I service/protocols/grpc_v2 --python_out=service/protocols/grpc_v2 \
	    --pyi_out=service/protocols/grpc_v2 service/protocols/grpc_v2/inference.proto

sbom: $(DEV) ## list the installed packages as CycloneDX: build/sbom.cdx.json
	@mkdir -p build
	$(BIN)/cyclonedx-py environment $(BIN)/python --output-format JSON -o build/sbom.cdx.json

bench: $(INSTALLED) ## measure start-up, new deployments, and speed against other servers
	@$(INSTALL) $(CLIENT) -e '.[bench]'
	$(BIN)/python -m benchmarks.startup --json benchmarks/results/startup.json
	$(BIN)/python -m benchmarks.served_accuracy --json benchmarks/results/served_accuracy.json
	$(BIN)/python -m benchmarks.swap_under_load --json benchmarks/results/swap_under_load.json
	$(BIN)/python -m benchmarks.swap_under_load --swaps 20 --keep-warm 600 \
	    --json benchmarks/results/swap_warm.json
	$(BIN)/python -m benchmarks.shadow --json benchmarks/results/shadow.json
	$(BIN)/python -m benchmarks.serving --json benchmarks/results/serving.json
	$(BIN)/python -m benchmarks.serving --workloads w2 --plan openvino-bf16 \
	    --json benchmarks/results/serving_bf16.json
	$(BIN)/python -m benchmarks.mixed --json benchmarks/results/mixed.json
	$(BIN)/python -m benchmarks.flame --svg docs/pictures/flame.svg --json benchmarks/results/flame.json

.env: # copied once; settings that .env.example gets later have their defaults
	@cp .env.example $@

# Random, made once. Only the folder's owner may enter it. The files are readable by all, because
# another user reads them in the containers.
SECRETS := $(addprefix secrets/,database_password mlflow_password mlflow_session_key service_key \
    mlflow_reader_password grafana_password metrics_token) # pragma: allowlist secret
$(SECRETS):
	@mkdir -p -m 700 secrets
	@$(PYTHON) -c 'import secrets; print(secrets.token_urlsafe(32))' > $@ && chmod 444 $@

up: .env $(SECRETS) ## build and start the containers (docs/operations.md)
	$(COMPOSE) build proxy service puller
	$(COMPOSE) up -d

down: ## stop the containers; the volumes stay
	$(COMPOSE) down

backup: ## save the containers' registry to one file: FILE=backups/DATE.tar
	deploy/backup.sh $(FILE)

upgrade: ## back up the registry, then migrate its tables to the image's version of MLflow
	deploy/backup.sh
	$(COMPOSE) stop mlflow control puller
	$(COMPOSE) run --rm mlflow mlflow db upgrade postgresql+psycopg2://mlflow@database/mlflow
	$(COMPOSE) up -d mlflow accounts control puller

update: ## rebuild the image and replace every replica of the service, losing no request
	$(COMPOSE) build service
	deploy/update.sh

restore: ## destroy the containers' registry and restore a backup: FILE=…
	deploy/restore.sh $(FILE)

test-containers: $(DEV) ## test real containers; starts an engine and makes base images if needed
	$(BIN)/python -m pytest -m containers tests/containers $(ARGS)

clean: ## remove .venv and caches; trained models stay in var/
	rm -rf .venv .venv-clients .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage build *.egg-info clients/python/*.egg-info
