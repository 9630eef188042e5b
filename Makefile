# Two commands do everything: `make serve` runs peerkv, `make test` passes its tests. Both install what is missing.
.DEFAULT_GOAL := help
.PHONY: help install serve test fuzz clients containers bench bench-gpu quality lint clean
BIN := .venv/bin

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: ## make .venv and install (TARGET=cpu|gpu, PYTHON=…; quick when nothing changed)
	@PYTHON='$(PYTHON)' TARGET='$(TARGET)' ./install.sh

serve: install ## start the replicas and the gateway (MODEL=…, ARGS='--replicas 2 --port 8000')
	@$(BIN)/peerkv serve $(MODEL) $(ARGS)

test: install ## run every test, real vLLM replicas included, GPU tests where two GPUs are (ARGS='-k steering' to choose)
	@command -v curl >/dev/null || { echo 'the tests use curl: apt-get install curl' >&2; exit 1; }
	@failed=; for tests in 'tests/unit -n 2 --dist worksteal' tests/gpu 'tests/real -n 2 --dist loadgroup'; do \
		run() { $(BIN)/python -m pytest $$tests $(ARGS) "$$@"; }; run; status=$$?; \
		if [ $$status = 1 ]; then echo 'RERUN: what failed above, once more and in fresh processes'; run --lf --lfnf=none; status=$$?; \
		elif [ $$status = 5 ]; then status=0; fi; \
		[ $$status = 0 ] || failed=1; done; [ -z "$$failed" ]  # 5: ARGS chose none of these

fuzz: install ## thousands of generated requests, valid and not, against a gateway over fake engines (ARGS='--url URL --key KEY --examples 200')
	@$(BIN)/python -m tests.fuzz $(ARGS)

clients: install ## stock clients (openai, anthropic, litellm, …), installed apart, against a gateway (ARGS='--url URL --key KEY --node')
	@$(BIN)/python -m tests.clients $(ARGS)

containers: install ## build the images with podman, run them by compose.yaml and try them out (as root; ARGS='-k import' to choose)
	@tests/containers/run.sh $(ARGS)

bench: install ## start replicas, measure them with `peerkv bench`, end them (MODEL=…, ARGS='--json FILE --plot FILE')
	@$(BIN)/peerkv bench --start $(MODEL) --lengths 1000 2000 --samples 7 $(ARGS)

bench-gpu: install ## measure imports between two GPUs (needs TARGET=gpu and two GPUs that can reach each other)
	@$(BIN)/python -m tests.gpu.bench $(ARGS)

quality: install ## measure what codecs do to a model's answers, on the CPU (MODEL=…, ARGS='--json FILE --plot FILE')
	@$(BIN)/peerkv quality $(MODEL) $(ARGS)

lint: install ## format check, lint, types, import rules; shell scripts, images, compose.yaml
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/shellcheck install.sh .ci/run tests/containers/*.sh
	@$(BIN)/hadolint docker/*.Dockerfile tests/containers/*.Dockerfile
	@$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml docker/compose.nodes.yaml

clean: ## remove .venv and caches (not the model in the user's cache directory)
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
