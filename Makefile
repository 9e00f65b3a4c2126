# Needs make and Python 3.11 or newer. Everything else is installed into .venv, once.
PYTHON ?= python3
ARGS ?=
PRESET ?= patent-loop
# what every preset reaches in the demo, and what the default one does
SIZE ?= $(if $(filter patent-loop,$(PRESET)),30x,15x)
FLOOR ?= $(if $(filter patent-loop,$(PRESET)),-0.5pp,-1pp)
DATA ?= data
ENGINE ?= docker
IMAGE ?= filterpress-python:0.1.0
VEHICLE := runs/demo/vehicle
BIN := .venv/bin
STAMP := .venv/installed
BENCH := .venv/installed-bench

.DEFAULT_GOAL := help
.PHONY: help demo install test lint format manifests bench bench-presets image clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1	\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(STAMP) ## train a small network, compress it by a PRESET, release it, run it on a vehicle
	$(BIN)/python pipeline.py run --out runs/demo --preset $(PRESET) \
		--max-size $(SIZE) --min-accuracy $(FLOOR) $(ARGS)
	test -d $(VEHICLE) || $(BIN)/filterpress-device init $(VEHICLE) --store runs/demo/release \
		--root runs/demo/keys/root.json --development
	$(BIN)/filterpress-device update $(VEHICLE)
	$(BIN)/filterpress-device boot $(VEHICLE)

install: $(STAMP) ## create .venv with everything in it

test: $(STAMP) ## every test, on all cores; fewer with ARGS="-m 'not slow'"
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile $(ARGS)

lint: $(STAMP) ## style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

manifests: $(STAMP) ## compile the pipeline, write its Kubernetes resources: manifests/
	$(BIN)/python pipeline.py manifests

bench-presets: $(BENCH) ## compare the presets, in days of two cores, a point at a time; DATA as for bench
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/presets.py --data-dir $(DATA) $(ARGS)

bench: $(BENCH) ## reproduce the results of README.md, in hours; DATA=folder of Fashion-MNIST
	$(BIN)/python benchmarks/networks.py --data-dir $(DATA) $(ARGS)
	$(BIN)/python benchmarks/stages.py torchvision:resnet18 torchvision:resnet50

image: ## build the image that the pipeline's steps run in; see docs/images.md
	$(ENGINE) build -f docker/stage.Dockerfile -t $(IMAGE) \
		--label org.opencontainers.image.revision="$$(git rev-parse HEAD)" $(ARGS) .

clean: ## remove what was built; keeps .venv and runs/
	rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis \
		.import_linter_cache local_outputs
	find src tests components benchmarks -name __pycache__ -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "filterpress needs Python 3.11 or newer; $(PYTHON) is" \
			"$$($(PYTHON) --version 2>&1 || echo missing). Name another: make PYTHON=python3.11"; \
		exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[all]'
	@touch $@

$(BENCH): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	@touch $@
