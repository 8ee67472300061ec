/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The event loop, seen from its system calls: an iteration is the time from the return of epoll_wait
 * to the next call of it. Raw tracepoints see every system call of the host, so the first thing each
 * program does is to leave: by number on entry, by thread on exit.
 *
 * The build passes the system call numbers SYS_epoll_wait ... SYS_accept4 of this machine, and the
 * probe ids PROBE_ITERATION and PROBE_ACCEPT; the loader fills `loops` with the threads to watch.
 */

BPF_HASH(loops, u32, struct loop_state, MAX_LOOPS);

static __always_inline void end_iteration(struct loop_state *loop, u64 pid_tid, u64 now_ns)
{
	struct event iteration = {
		.start_ns = loop->wait_end_ns,
		.value = {loop->ready, loop->accepted},
		.pid = pid_tid >> 32,
		.tid = (u32)pid_tid,
		.probe = PROBE_ITERATION,
		.stack = NO_STACK,
	};
	struct probe_counters *counter = counters_of(PROBE_ITERATION);

	loop->wait_end_ns = 0;
	COUNT(hits, 1);
	send_span(&iteration, now_ns, ITERATION_MIN_NS);
}

int loop_sys_enter(struct bpf_raw_tracepoint_args *ctx)
{
	u64 number = ctx->args[1];
	bool waits = number == SYS_epoll_wait || number == SYS_epoll_pwait || number == SYS_epoll_pwait2;

	if (!waits && number != SYS_accept && number != SYS_accept4)
		return 0;

	u64 pid_tid = bpf_get_current_pid_tgid();
	u32 tid = pid_tid;
	struct loop_state *loop = loops.lookup(&tid);

	if (!loop)
		return 0;
	u64 now_ns = bpf_ktime_get_ns();

	loop->syscall = number;
	if (waits) {
		if (loop->wait_end_ns)
			end_iteration(loop, pid_tid, now_ns);
	} else {
		struct pt_regs *regs = (struct pt_regs *)ctx->args[0];
		u64 fd = 0;

		read_kernel(&fd, sizeof(fd), &regs->di);
		loop->listener_fd = fd;
		loop->accept_ns = now_ns;
	}
	return 0;
}

int loop_sys_exit(struct bpf_raw_tracepoint_args *ctx)
{
	u64 pid_tid = bpf_get_current_pid_tgid();
	u32 tid = pid_tid;
	struct loop_state *loop = loops.lookup(&tid);

	if (!loop || !loop->syscall)
		return 0;
	u64 now_ns = bpf_ktime_get_ns();
	s64 result = ctx->args[1];
	u32 number = loop->syscall;

	loop->syscall = 0;
	if (number != SYS_accept && number != SYS_accept4) {
		loop->wait_end_ns = now_ns;
		loop->ready = result > 0 ? result : 0;
		loop->accepted = 0;
		return 0;
	}

	struct event accept = {
		.start_ns = loop->accept_ns,
		.value = {loop->listener_fd, result},
		.pid = pid_tid >> 32,
		.tid = tid,
		.probe = PROBE_ACCEPT,
		.stack = NO_STACK,
	};
	struct probe_counters *counter = counters_of(PROBE_ACCEPT);

	COUNT(hits, 1);
	if (result >= 0)
		loop->accepted++;
	/* the call that finds the queue empty (EAGAIN) ends every round of accepts: count it, do not send it
	 */
	send_span(&accept, now_ns, result < 0 ? ~0ULL : 0);
	return 0;
}
