# The test machine without Vagrant. Included by the Makefile at the top.
#   make vm           build its image (root; nothing to do when it is current)
#   make test-vm      the tests that need kernel probes, on Debian's 6.1 kernel
#   make test-vm-all  the same on 6.1 and 6.12
#   make bench-vm     what the listener's probes cost there, beside their peers
# The other tests of tests/kernel run on any kernel, natively and ten times faster: make test. In the machine:
#   make test-vm VM_TESTS='python -m pytest tests/kernel -q'
PYTHON ?= python3
VM ?= $(PYTHON) vagrant/vm
VM_KERNELS := 6.1 6.12
VM_TESTS ?= python -m pytest -q tests/kernel/test_listener.py tests/kernel/test_listener_record.py tests/kernel/test_event_loop.py \
	tests/kernel/test_watch_hooks.py

VM_BENCH ?= python tests/bench/run.py listener

.PHONY: vm test-vm test-vm-all bench-vm $(VM_KERNELS:%=test-vm-%) $(VM_KERNELS:%=bench-vm-%)

vm:
	$(VM) build

$(VM_KERNELS:%=test-vm-%): test-vm-%: vm
	rm -rf .vm/results/$*
	$(VM) run --kernel $* --out .vm/results/$* -- $(VM_TESTS)

$(VM_KERNELS:%=bench-vm-%): bench-vm-%: vm
	$(VM) run --kernel $* -- $(VM_BENCH)

test-vm: test-vm-6.1

test-vm-all: $(VM_KERNELS:%=test-vm-%)

bench-vm: $(VM_KERNELS:%=bench-vm-%)
