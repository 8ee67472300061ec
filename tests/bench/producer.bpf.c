/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One record for each getppid of one process, sent as our probes send theirs. The same text is compiled
 * for both readers. The build passes RING_PAGES, SYS_getppid and PRODUCER, the process.
 */
#include <uapi/linux/ptrace.h>
#include "event.h"

BPF_RINGBUF_OUTPUT(events, RING_PAGES);
BPF_ARRAY(lost, u64, 1);

int produce(struct bpf_raw_tracepoint_args *ctx)
{
	if (ctx->args[1] != SYS_getppid)
		return 0;
	u64 pid_tid = bpf_get_current_pid_tgid();

	if (pid_tid >> 32 != PRODUCER)
		return 0;
	struct event event = {
		.start_ns = bpf_ktime_get_ns(),
		.duration_ns = 1,
		.pid = pid_tid >> 32,
		.tid = (u32)pid_tid,
		.probe = 4,
		.cpu = bpf_get_smp_processor_id(),
		.stack = NO_STACK,
	};
	int first = 0;

	if (events.ringbuf_output(&event, sizeof(event), BPF_RB_NO_WAKEUP))
		lost.increment(first);
	return 0;
}
