# Measured figures beside a peer's. Included by the Makefile at the top.
#   make bench         everything: needs root, takes about 5 minutes
#   make bench-quick   fewer and shorter rounds, under 90 s
BENCH_JSON ?=

.PHONY: bench bench-quick

bench bench-quick:
	$(PYTHON) tests/bench/run.py $(if $(filter bench-quick,$@),--quick) $(if $(BENCH_JSON),--json $(BENCH_JSON))
