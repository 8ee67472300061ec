# Measured figures beside a peer's. Included by the Makefile at the top.
#   make bench         everything: needs root, takes about 5 minutes
#   make bench-quick   fewer and shorter rounds, about 2 minutes
#   make soak          stallscope watch for an hour, with stalls at known times; SOAK_SECONDS=600 for less
BENCH_JSON ?=
SOAK_SECONDS ?= 3600
BENCH_PACKAGES := $(DEMO_PACKAGES) bpftrace gdb linux-perf redis-server redis-tools tshark

.PHONY: bench bench-quick bench-packages soak
bench-packages: PACKAGES = $(BENCH_PACKAGES)

bench bench-quick: setup bench-packages
	$(PYTHON) vagrant/lab/build.py 2.8.17 5.0.6 >/dev/null
	$(PYTHON) tests/bench/run.py $(if $(filter bench-quick,$@),--quick) $(if $(BENCH_JSON),--json $(BENCH_JSON))

soak: setup demo-packages
	$(PYTHON) vagrant/lab/build.py 2.8.17 5.0.6 >/dev/null
	$(PYTHON) tests/bench/soak.py --seconds $(SOAK_SECONDS)
