/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Joined in front of every program: the ring buffer, the counters, and the only two functions that
 * use them. The build passes RING_PAGES, MAX_PROBES, MAX_CPUS, MIN_DURATION_NS.
 *
 * The consumer polls; BPF_RB_NO_WAKEUP keeps every probe from waking it (1.4 us against 25 ns).
 */

BPF_RINGBUF_OUTPUT(events, RING_PAGES);
/*
 * By CPU and probe. No per-CPU map, because that cannot be mapped: while a CPU reads one by bpf(2), no
 * kprobe's program runs there (Linux bpf_disable_instrumentation).
 */
#define COUNTER_PLACES (MAX_CPUS * MAX_PROBES)
BPF_F_TABLE("array", u32, struct probe_counters, counters, COUNTER_PLACES, BPF_F_MMAPABLE);

/*
 * The kernel's helpers by number: under its own names for them bcc searches all of /proc/kallsyms once
 * per call in the source (0.1 s each) for kernels older than the ring buffer.
 */
static long (*read_user)(void *to, u32 bytes, const void *from) = (void *)BPF_FUNC_probe_read_user;
static long (*read_kernel)(void *to, u32 bytes, const void *from) = (void *)BPF_FUNC_probe_read_kernel;

/*
 * Programs on uprobes may be preempted (Linux commit 8c7dcb84e3b7, v6.0), so even a per-CPU counter
 * is added to atomically.
 */
#define COUNT(field, amount)                                           \
	do {                                                           \
		if (counter)                                           \
			__sync_fetch_and_add(&counter->field, amount); \
	} while (0)

static __always_inline struct probe_counters *counters_of(u32 probe)
{
	u32 place = bpf_get_smp_processor_id() * MAX_PROBES + probe;

	return counters.lookup(&place);
}

static __always_inline void send(struct event *event, struct probe_counters *counter)
{
	event->cpu = bpf_get_smp_processor_id();
	if (events.ringbuf_output(event, sizeof(*event), BPF_RB_NO_WAKEUP) == 0)
		COUNT(sent, 1);
	else
		COUNT(lost, 1);
}

/* Send a finished span, or only count it when it is shorter than min_ns. */
static __always_inline void send_span(struct event *event, u64 end_ns, u64 min_ns)
{
	struct probe_counters *counter = counters_of(event->probe);

	event->duration_ns = end_ns - event->start_ns;
	if (event->duration_ns < min_ns) {
		COUNT(short_calls, 1);
		COUNT(short_ns, event->duration_ns);
		return;
	}
	send(event, counter);
}
