# Two commands matter: `make demo` and `make test`. Each sets up what it needs. `make help` lists all.
PYTHON ?= python3.11
BIN := .venv/bin
GLYPHS := weights/glyphs
SCENES := weights/scenes
REPOSITORY := model_repository
SOURCES := flowturbo export training tuning bench research examples client tests

.PHONY: help demo gallery test unit check format setup export serve web quality editing study \
  refiners train train-scenes fonts bench hostile gpu-check gpu-profile gpu-serve-check xl-check \
  sd35-check rectified-check clean
.DEFAULT_GOAL := help

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 17

demo: export  ## serve the glyphs model and write picture grids to output/
	$(BIN)/python examples/demo.py --repository $(REPOSITORY) --output output

test: check  ## run lint, type checks and all tests
	$(BIN)/pytest

unit: setup  ## run the tests that need no export and no server (seconds)
	$(BIN)/pytest -m unit tests
	$(BIN)/pytest client/tests

format: setup  ## format the code and apply the fixes of the linter
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

check: setup  ## check format, lint and types
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy

setup: .venv/.installed  ## create the virtual environment with all dependencies

.venv/.installed: pyproject.toml client/pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt \
	  -e client -e '.[serve,export,training,bench,gateway,gpu,dev]'
	# Its metadata require torchvision, which its Inception does not need.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps torch-fidelity==0.4.0
	touch $@

export: setup  ## export both models to the model repository, if they are not up to date
	$(BIN)/python -m export --name glyphs --predictor $(GLYPHS)/predictor.safetensors \
	  --refiner $(GLYPHS)/refiner.safetensors --vae $(GLYPHS)/vae \
	  --class-names $(GLYPHS)/classes.txt --presets $(GLYPHS)/presets.json --solvers $(GLYPHS)/solvers.npz \
	  --guidance-scale 3 --ensemble H1P5R3 --repository $(REPOSITORY)
	$(BIN)/python -m export --name scenes --diffusers $(SCENES)/model --refiner $(SCENES)/refiner \
	  --text-length 0 --presets $(SCENES)/presets.json --solvers $(SCENES)/solvers.npz \
	  --guidance-scale 3 --repository $(REPOSITORY)

gallery: export  ## draw one page of examples from the served models, output/gallery.png
	$(BIN)/python examples/gallery.py --repository $(REPOSITORY)

serve: export  ## serve the model repository until Ctrl-C
	$(BIN)/python -m flowturbo.serve --repository $(REPOSITORY)

web: export  ## serve the models, the OpenAI images API and a web page on port 8080, until Ctrl-C
	$(BIN)/python examples/web.py --repository $(REPOSITORY)

quality: export  ## measure recognition and Fréchet distance of 1,000 images per model and schedule
	$(BIN)/python -m research.quality --repository $(REPOSITORY) --weights $(GLYPHS) \
	  --json $(GLYPHS)/quality.json
	for set in mixed single two single-new two-new; do $(BIN)/python -m research.quality \
	  --repository $(REPOSITORY) --pipeline scenes --weights $(SCENES) --scenes $$set \
	  --json $(SCENES)/quality-$$set.json || exit; done

editing: export  ## measure inpainting, editing and inversion of both models
	for pipeline in glyphs scenes; do $(BIN)/python -m research.editing --repository $(REPOSITORY) \
	  --pipeline $$pipeline || exit; done

study: export  ## measure image quality against time, docs/benchmarks/study.md; resumes, first prints its duration
	$(BIN)/python -m research.study --repository $(REPOSITORY) --weights $(GLYPHS) \
	  --json docs/benchmarks/study.json --report docs/benchmarks/study.md

refiners: export  ## train the refiners of the last section of the study (an hour, and 5 minutes for data)
	$(BIN)/python -m research.study.refiners --repository $(REPOSITORY) --weights $(GLYPHS)

bench: export  ## measure load with perf_analyzer, compare with PyTorch and diffusers behind FastAPI
	$(BIN)/python -m bench.load --repository $(REPOSITORY) --baseline
	$(BIN)/python -m bench.compare_prompts --repository $(REPOSITORY)

hostile: export  ## send 50,000 hostile HTTP requests to the gateway
	$(BIN)/python -m bench.hostile --repository $(REPOSITORY)

gpu-check: setup  ## time SiT-XL/2's blocks and schedules in every available engine, bf16 first
	$(BIN)/python -m bench.gpu_check $(GPU_CHECK)

gpu-profile: setup  ## profile a SiT-XL/2 step: products, attention, kernels, decoder, one CUDA graph
	$(BIN)/python -m bench.gpu_profile

gpu-serve-check: setup  ## serve SiT-XL/2 (random weights) in PyTorch, without TensorRT, under load
	$(BIN)/python -m bench.gpu_serve_check

xl-check: setup  ## export SiT-XL/2 (random weights), build its engines, train a refiner; needs no GPU
	$(BIN)/python -m bench.xl_check

sd35-check: setup  ## export SD3.5-M at real size (random weights, bf16, without T5); needs no GPU
	$(BIN)/python -m bench.folder_check --model sd35-medium --precision bf16 --size 256x256

rectified-check: setup  ## train ten steps of 2-RF's refiner at real size (random weights); no GPU
	$(BIN)/python -m bench.folder_check --model rectified-flow --part refiner

fonts: setup  ## install the fonts that training renders; needs root
	apt-get update -qq
	apt-get install -y -qq --no-install-recommends $$($(BIN)/python -m training.fonts)

train: setup  ## train the glyphs model from scratch (2.5 hours on two cores); resumes
	$(BIN)/python -m training.glyphs --out $(GLYPHS)

train-scenes: setup  ## train the scenes model from scratch (2 hours on two cores); resumes
	$(BIN)/python -m training.scenes --out $(SCENES)

clean:  ## remove everything that was made here, except training runs
	rm -rf .venv output $(REPOSITORY)/*_* $(REPOSITORY)/flowturbo/1/pipelines
