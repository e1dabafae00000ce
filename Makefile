# make run    install, then the main job on the embedded default
# make test   install, then everything CI checks (make test-all: slow tests too)
# make lab    JupyterLab; every notebook is paired with a script in pynbs/
# make docs   the book, in _docs/ (QUARTO=1: by Quarto); make read serves it
# make sync   notebooks -> golf/, clean notebooks, README.md
VENV := .venv
BIN  := $(VENV)/bin
RUN  := $(BIN)/papermill --no-progress-bar nbs/99_run.ipynb
SEED := 1337
CHAPTERS := $(wildcard nbs/*.ipynb)
TESTS    := $(wildcard tests/test_*.py)

.PHONY: run test test-all lab docs read sync clean \
  $(CHAPTERS:%=test-%) $(TESTS:%=test-%)
.DELETE_ON_ERROR:

$(VENV)/installed: constraints.txt pyproject.toml
	python3 -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check \
	  -c constraints.txt -e '.[dev]'
	touch $@

run: $(VENV)/installed
	mkdir -p runs
	$(RUN) runs/s$(SEED).ipynb -p seed $(SEED)

test: $(VENV)/installed
	$(BIN)/python tests/stale.py
	$(MAKE) -k -j2 --output-sync $(CHAPTERS:%=test-%)
	tmp=$$(mktemp -d) && trap 'rm -rf '$$tmp EXIT && \
	$(RUN) $$tmp/run.ipynb -p config smoke -p out $$tmp/run \
	  -p overrides '{train: {seconds: 10}}'
	$(MAKE) -k -j2 --output-sync $(TESTS:%=test-%)

# A process for each: what one chapter holds open is none of the next one's.
# Two at a time with a thread each: threads without a core wait for a turn.
$(CHAPTERS:%=test-%) $(TESTS:%=test-%): export OMP_NUM_THREADS = 1
$(CHAPTERS:%=test-%): test-%: $(VENV)/installed
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/nbdev_test --path $* --n_workers 0

$(TESTS:%=test-%): test-%: $(VENV)/installed
	$(BIN)/python -m pytest -q $*

test-all: $(VENV)/installed
	$(MAKE) test
	$(BIN)/python -m pytest -q tests -m slow

lab: $(VENV)/installed
	$(BIN)/jupytext --quiet --sync nbs/*.ipynb
	$(BIN)/jupyter lab nbs

docs: $(VENV)/installed
	$(BIN)/golf docs $(if $(QUARTO),--quarto)

read: docs
	$(BIN)/python -m http.server --directory _docs 8000

sync: $(VENV)/installed
	$(BIN)/python tests/stale.py --mend

clean:
	rm -rf $(VENV) *.egg-info build .pytest_cache _docs _proc
