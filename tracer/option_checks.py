"""What may be asked of everything that traces: ``record``, ``top`` and ``watch`` are held to the same."""

from __future__ import annotations

from stallscope.tracer.errors import UsageError

LEAST_SAMPLE_NS = 1_000_000
LEAST_RING_BYTES = 65_536


def require_sample_interval(sample_ns: int) -> None:
    """Raise UsageError for an interval of samples (ns) that costs more than it shows."""
    if sample_ns < LEAST_SAMPLE_NS:
        raise UsageError("--sample is below 1ms; the sampler would cost more than it shows")


def require_ring_size(size: int) -> None:
    """Raise UsageError for a size of ring buffers (bytes) that the kernel refuses, or that is of no use."""
    if size < LEAST_RING_BYTES or size & (size - 1):
        raise UsageError("--ring-size must be a power of two and at least 64K, as 8M")
