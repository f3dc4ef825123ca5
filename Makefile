# Two commands matter: `make demo` and `make test`. Each sets up what it needs. `make help` lists all.
PYTHON ?= python3.11
BIN := .venv/bin
GLYPHS := weights/glyphs
REPOSITORY := model_repository
SOURCES := flowturbo export training tuning bench research examples client tests

.PHONY: help demo test unit check format setup export serve quality study refiners train fonts \
  bench gpu-check gpu-profile gpu-serve-check xl-check clean
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 17

demo: export  ## serve the glyphs model and write picture grids to output/
	$(BIN)/python examples/demo.py --repository $(REPOSITORY) --output output

test: check  ## lint, types and all tests
	$(BIN)/pytest

unit: setup  ## the tests that need no export and no server; seconds
	$(BIN)/pytest -m unit tests
	$(BIN)/pytest client/tests

format: setup  ## formats the code, and mends what the linter can
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

check: setup  ## format, lint and types
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy

setup: .venv/.installed  ## the virtual environment, with everything that is needed here

.venv/.installed: pyproject.toml client/pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt \
	  -e client -e '.[serve,export,training,bench,gpu,dev]'
	# Its metadata ask for torchvision, which its Inception does not need.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps torch-fidelity==0.4.0
	touch $@

export: setup  ## the glyphs model to the model repository; nothing to do if it is there
	$(BIN)/python -m export --name glyphs --predictor $(GLYPHS)/predictor.safetensors \
	  --refiner $(GLYPHS)/refiner.safetensors --vae $(GLYPHS)/vae \
	  --class-names $(GLYPHS)/classes.txt --presets $(GLYPHS)/presets.json --guidance-scale 3 --ensemble fast H1P5R3 \
	  --repository $(REPOSITORY)

serve: export  ## until Ctrl-C
	$(BIN)/python -m flowturbo.serve --repository $(REPOSITORY)

quality: export  ## recognition and Fréchet distance of 1,000 images: H8, H1P5R3 and the default
	$(BIN)/python -m research.quality --repository $(REPOSITORY) --weights $(GLYPHS) \
	  --json $(GLYPHS)/quality.json

study: export  ## quality against time, docs/quality.md; resumes, says at its start how long it takes
	$(BIN)/python -m research.study --repository $(REPOSITORY) --weights $(GLYPHS) \
	  --json docs/benchmarks/study.json --report docs/quality.md

refiners: export  ## those of the study's last section; an hour for training, five minutes for data
	$(BIN)/python -m research.study.refiners --repository $(REPOSITORY) --weights $(GLYPHS)

bench: export  ## load with perf_analyzer, and the service beside PyTorch and FastAPI; 20 minutes
	$(BIN)/python -m bench.load --repository $(REPOSITORY) --baseline

gpu-check: setup  ## times SiT-XL/2's blocks and schedules in every engine that is here, bf16 first
	$(BIN)/python -m bench.gpu_check $(GPU_CHECK)

gpu-profile: setup  ## where the time of a SiT-XL/2 step goes: products, attention, kernels, decoder, one graph
	$(BIN)/python -m bench.gpu_profile

gpu-serve-check: setup  ## serves SiT-XL/2 (random weights) in PyTorch, without TensorRT, and puts load on it
	$(BIN)/python -m bench.gpu_serve_check

xl-check: setup  ## exports SiT-XL/2 with random weights, builds its engines, trains a refiner; needs no GPU
	$(BIN)/python -m bench.xl_check

fonts: setup  ## the fonts that training renders; needs root
	apt-get update -qq
	apt-get install -y -qq --no-install-recommends $$($(BIN)/python -m training.fonts)

train: setup  ## the glyphs model from nothing, about two and a half hours on two cores; resumes
	$(BIN)/python -m training --out $(GLYPHS)

clean:  ## all that is made here but the training runs
	rm -rf .venv output $(REPOSITORY)/*_* $(REPOSITORY)/flowturbo/1/pipelines
