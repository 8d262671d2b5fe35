# `make` alone lists what there is to make.

LOCK ?= cpu# or gpu: export LOCK=gpu
ARGS ?=#     more arguments for pytest: make test ARGS="-k split -x"
JOBS ?= 2#   tests at once; 0 runs them one after the other, in one process
UV_LOCK = uv pip compile --universal --python-version 3.11 --generate-hashes --no-strip-extras \
	--no-emit-index-url --no-emit-find-links --no-annotate --no-header --quiet
COMPOSE_FILES = docker-compose.yml $(wildcard docs/clusters/compose.*.yml)
MANIFESTS = docs/clusters/kubernetes.yaml docs/clusters/kubernetes-worker-job.yaml
SCRIPTS = .ci/run locks/install $(wildcard docs/clusters/*.sh docs/clusters/*.sbatch)

.DEFAULT_GOAL := help
.PHONY: help run test test-unit coverage lint format docs lock clean setup setup-dev

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-16s %s\n", $$1, $$2}'

run: setup ## run the quickstart study and export its best configuration to runs/export
	.venv/bin/tuner launch studies/quickstart.toml --export runs/export

PYTEST = .venv/bin/python -m pytest --numprocesses=$(JOBS) --dist=worksteal

test: setup-dev ## run all tests (ARGS="..." is handed to pytest)
	$(PYTEST) $(ARGS)

test-unit: setup-dev ## run the tests of single packages, which take about two minutes
	$(PYTEST) tests/unit $(ARGS)

coverage: setup-dev ## run all tests with branch coverage, also of the processes that they start
	$(PYTEST) --cov --cov-report=term $(ARGS)

# Every check runs, so that one call shows all problems.
lint: setup-dev ## check style, types, the layering of imports, containers, manifests and scripts
	@failed=; \
	check() { echo "== $$*"; .venv/bin/"$$@" || failed="$$failed, $$*"; }; \
	check ruff check .; \
	check ruff format --check .; \
	check mypy; \
	check lint-imports --no-logo; \
	check hadolint Dockerfile; \
	check check-jsonschema --builtin-schema vendor.compose-spec $(COMPOSE_FILES); \
	check compose-lint --strict-config --skip-suppressed --fail-on low docker-compose.yml; \
	check kubernetes-validate --strict --quiet $(MANIFESTS); \
	check check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml; \
	check shellcheck $(SCRIPTS); \
	[ -z "$$failed" ] || { echo "lint: failed: $${failed#, }" >&2; exit 1; }

format: setup-dev ## format the code and fix what ruff can fix by itself
	.venv/bin/ruff check --fix-only .
	.venv/bin/ruff format .

docs: setup-dev ## write docs/cli.md from the program, and copy studies/ into the package
	.venv/bin/python tests/cli_page.py
	cp studies/*.toml tuner/examples/

lock: ## write locks/ anew from pyproject.toml (needs uv; LOCK_FLAGS=--upgrade takes newer versions)
	$(UV_LOCK) pyproject.toml --extra cpu --extra audit $(LOCK_FLAGS) -o locks/cpu.txt
	$(UV_LOCK) pyproject.toml --extra gpu --extra audit -c locks/cpu.txt $(LOCK_FLAGS) -o locks/gpu.txt
	$(UV_LOCK) --group dev -c locks/cpu.txt $(LOCK_FLAGS) -o locks/dev.txt
	$(UV_LOCK) --group compare -c locks/cpu.txt $(LOCK_FLAGS) -o locks/compare.txt

clean: ## remove .venv and every cache; never runs/
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis htmlcov
	rm -rf .coverage .coverage.* build *.egg-info
	find . -path ./runs -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

setup: ## set up .venv with all that `tuner` needs (run and test do it by themselves)
	@locks/install $(LOCK)

setup-dev: ## set up .venv with the tools of development as well
	@locks/install $(LOCK) dev
