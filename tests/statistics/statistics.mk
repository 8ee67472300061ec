# Statistics against simulated truth, and verdicts on real servers. Included by the Makefile at the top.
#   make statistics         errors and power of diff and verify, into docs/power.md: about 15 minutes
#   make statistics-lab     pairs of the lab's servers, and 20 pairs of the same: needs root, about 15 minutes
STATISTICS_RUNS ?= 2000

.PHONY: statistics statistics-lab
statistics: setup
	OPENBLAS_NUM_THREADS=1 $(PYTHON) tests/statistics/check.py --runs $(STATISTICS_RUNS) --docs docs

statistics-lab: setup demo-packages
	$(PYTHON) vagrant/lab/build.py 2.8.17 2.8.17-patched 5.0.6 >/dev/null
	$(PYTHON) tests/statistics/pairs.py
