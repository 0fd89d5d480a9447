# A reader needs `make lab` and `make test`; the other targets are for writing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NOTEBOOKS := $(wildcard notebooks/*.ipynb)

# What a run or an editor leaves behind beside nbstripout's own list.
STRAY_KEYS := metadata.language_info.version metadata.toc \
  cell.metadata.editable cell.metadata.jp-MarkdownHeadingCollapsed \
  cell.metadata.slideshow cell.metadata.trusted

CUDA_VENV := .venv-cuda

.PHONY: lab work fresh test test-cuda bench record execute nav html lock clean

# Jupyter refuses root unless told; in a container there is often nobody else.
ROOT_FLAG := $(if $(filter 0,$(shell id -u)),--allow-root)

# The root is here, and not beside the notebook, so that links to ../helpers work.
# On another machine: make lab LAB_FLAGS="--no-browser --port=8889"
lab: $(INSTALLED) work
	$(BIN)/jupyter lab --ServerApp.root_dir=. $(ROOT_FLAG) $(LAB_FLAGS) \
	  work/00_start_here.ipynb

# Copies of the notebooks, for a reader's own runs: they stay as they are left, and
# `make test` and git know nothing of them.
work:
	mkdir -p work
	cp -R notebooks/images work
	for page in $(notdir $(NOTEBOOKS)); do \
	  [ -e "work/$$page" ] || cp "notebooks/$$page" work; done

# The copies once more as they were at first; a reader's other files stay.
fresh:
	mkdir -p work
	cp $(NOTEBOOKS) work
	cp -R notebooks/images work

# Strict nbval: each committed output is held against a new one. A notebook's
# cells share a kernel, and a browser's tests a JupyterLab, so that a whole file goes
# to one worker; tests/conftest.py has the order. The workers have a core each; with
# more threads they would wait for one another.
test: export OMP_NUM_THREADS := 1
test: $(INSTALLED)
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder \
	  --nbval --nbval-current-env --nbval-cell-timeout 120 tests notebooks

# CUDA's own bytes: on this machine's GPU, or else on cards that are not there, under
# PyTorch's own CUDA code (tests/nocard). Some 5 GB, and so in an environment of its own.
test-cuda: export OMP_NUM_THREADS := 1
test-cuda: $(CUDA_VENV)/.installed
	tests/nocard/test.sh $(CUDA_VENV)

# The empty folder is for a pip that would find a wheel without CUDA nearer by.
$(CUDA_VENV)/.installed: requirements.lock Makefile
	$(PYTHON) -m venv $(CUDA_VENV)
	mkdir -p $(CUDA_VENV)/none
	PIP_FIND_LINKS=$(CURDIR)/$(CUDA_VENV)/none $(CUDA_VENV)/bin/pip install \
	  -c requirements.lock torch torchvision timm numpy pandas tqdm pytest transformers \
	  anywidget matplotlib ipython ipywidgets cloudpickle pillow \
	  'nvidia-cuda-crt==13.0.*' 'nvidia-cuda-cccl==13.0.*'
	touch $@

bench: $(INSTALLED)
	$(BIN)/python -m tests.bench

# What this machine's GPU does, for readers without one: helpers/recording/*.json
record: $(INSTALLED)
	$(BIN)/python -m helpers.recording

# On a busy machine the lines that a cell prints would come apart.
COALESCE := nbconvert.preprocessors.CoalesceStreamsPreprocessor

# One notebook: make execute NOTEBOOKS=notebooks/00_start_here.ipynb
execute: $(INSTALLED)
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace \
	  --ExecutePreprocessor.store_widget_state=False \
	  --ExecutePreprocessor.record_timing=False \
	  --NotebookExporter.preprocessors=$(COALESCE) $(NOTEBOOKS)
	$(BIN)/nbstripout --keep-output --keep-count --keep-id \
	  --extra-keys "$(STRAY_KEYS)" $(NOTEBOOKS)

# The links between notebooks, and README's table of them.
nav: $(INSTALLED)
	$(BIN)/python -m tests.notebooks.navigation

html: $(INSTALLED)
	$(BIN)/python -m tests.notebooks.pages html

# JupyterLab would open with a question about its news and fetch announcements, and
# the tests' Notebook 7 and Voilà would give it buttons of theirs. sys_prefix keeps
# these settings in .venv and out of the reader's home.
$(INSTALLED): pyproject.toml requirements.lock | $(BIN)/pip
	$(BIN)/pip install -c requirements.lock -e '.[dev]'
	$(BIN)/jupyter labextension disable --level=sys_prefix \
	  @jupyterlab/apputils-extension:announcements @jupyter-notebook/lab-extension \
	  @voila-dashboards/jupyterlab-preview
	touch $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, and $(PYTHON) is not:" \
	  "try make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Run this with the oldest Python supported: its newest packages also run on the
# later ones. torch stays where it is, since the notebooks quote what it does: to
# move it, edit its pin first. A local suffix (+cpu) would tie the pins to one
# build, and torch itself pins the CUDA packages that it brings on Linux.
lock:
	rm -rf .lock
	$(PYTHON) -m venv .lock
	grep '^torch==' requirements.lock > .lock/torch
	.lock/bin/pip install -c .lock/torch -e '.[dev]'
	.lock/bin/pip freeze --all --exclude-editable --exclude pip > .lock/all
	{ echo '# Every version tested, for Python 3.11 to 3.13: make lock'; \
	  grep -Ev '^(cuda|nvidia|triton)' .lock/all | sed 's/+.*//' \
	  | LC_ALL=C sort -f; } > requirements.lock
	rm -rf .lock

clean:
	rm -rf $(VENV) $(CUDA_VENV) tests/nocard/build .lock html build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
	find . -name .ipynb_checkpoints -prune -exec rm -rf {} +
