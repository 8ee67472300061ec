# Everything runs from a fresh clone: each target installs what it needs first (packages only as root).
#   make demo    build Redis 2.8, reproduce the incident, record it, say what blocked Redis and draw the timeline
#   make test    every test this kernel allows; what is skipped is listed with its reason
#   make lint    ruff, mypy, clang-format
#   make bench   the figures of README's "What it costs", beside their peers
#   make statistics   how often diff and verify are wrong, against simulated truth
#   make case    the incident's story again: recordings of all variants, their table, CASE-STUDY.md
#   make vm      the test machine with kernel probes (vagrant/); make test-vm runs the kernel tests in it
SHELL := /bin/bash
PYTHON := .venv/bin/python
BIN := .venv/bin
RECIPE ?= incident
DEMO ?= demo.stall
BUILDS := 2.8.17 2.8.17-patched 2.8.17-lto 3.2.6 5.0.6

DEMO_PACKAGES := python3-bpfcc python3-venv gcc make autoconf libc6-dev
VM_PACKAGES := mmdebstrap qemu-system-x86 e2fsprogs
# What opens the exports and the page, and makes captures; node may have come another way than from Debian.
NODE_PACKAGES := $(if $(shell command -v node),,nodejs) $(if $(shell command -v npm),,npm)
TEST_PACKAGES := $(DEMO_PACKAGES) patch binutils xz-utils iproute2 redis-server redis-tools util-linux \
	gdb tcpdump tshark chromium gnumeric prometheus systemd $(NODE_PACKAGES)

.PHONY: demo test lint bench setup format clean
demo: setup
	@[ "$$(id -u)" = 0 ] || { echo "make demo: tracing needs root; run: sudo make demo" >&2; exit 4; }
	$(PYTHON) vagrant/lab/build.py 2.8.17
	$(PYTHON) vagrant/lab/incident.py --build 2.8.17 --recipe $(RECIPE) -- \
		$(BIN)/stallscope record -p {pid} -d 15s -o $(DEMO) --force
	$(BIN)/stallscope summary $(DEMO)
	$(BIN)/stallscope report $(DEMO)

test: setup test-packages
	$(PYTHON) vagrant/lab/build.py $(BUILDS) >/dev/null
	$(PYTHON) -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror probes/*.c probes/*.h

format: setup
	$(BIN)/ruff format .
	$(BIN)/clang-format -i probes/*.c probes/*.h

setup: demo-packages .venv/ready

.venv/ready: pyproject.toml
	python3 -m venv .venv
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

# Install the missing ones of a list of packages; without root, say which.
# RUNLEVEL=1: a package's server (redis-server) is installed, not started.
demo-packages: PACKAGES = $(DEMO_PACKAGES)
test-packages: PACKAGES = $(TEST_PACKAGES)
vm-packages: PACKAGES = $(VM_PACKAGES)
demo-packages test-packages vm-packages bench-packages:
	@missing=$$(for name in $(PACKAGES); do \
		dpkg-query -W -f='$${Status}' $$name 2>/dev/null | grep -q 'ok installed' || echo $$name; done); \
	[ -z "$$missing" ] && exit 0; \
	[ "$$(id -u)" = 0 ] || { echo "make: packages are missing; run: sudo apt-get install" $$missing >&2; exit 4; }; \
	apt-get update -qq && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive \
		apt-get install -y -qq --no-install-recommends $$missing >/dev/null

clean:
	rm -rf .venv .cache build *.egg-info

include tests/bench/bench.mk
include tests/statistics/statistics.mk
include vagrant/vm.mk
include vagrant/case/case.mk
vm: setup vm-packages
