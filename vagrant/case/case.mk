# The incident's story, recorded, measured and written down. Included by the Makefile at the top.
#   make case        record what is not recorded yet, here and in the test machine, write CASE-STUDY.md, print the table
#   make case-table  the table alone, as last written
# About half an hour and 5 GB of memory. On a machine that others use: nice -n -15 make case.
.PHONY: case case-table
case: setup vm
	@$(MAKE) --no-print-directory demo-packages DEMO_PACKAGES="$(DEMO_PACKAGES) patch chromium"
	$(PYTHON) vagrant/lab/build.py >/dev/null
	$(PYTHON) vagrant/case/run.py all

case-table:
	$(PYTHON) vagrant/case/run.py table
