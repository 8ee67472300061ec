/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The event loop, seen from its system calls: an iteration is the time from the return of epoll_wait
 * to the next call of it. There are two ways to see them, with one body:
 *
 * - The functions behind these few system calls are hooked, by fentry and fexit or by kprobe and kretprobe
 *   (the lines HOOK_... at the end, written by the loader). Nothing else on the host is slowed down.
 * - Raw tracepoints see every system call of the host, so the first thing each program does is to leave: by
 *   number on entry, by thread on exit.
 *
 * The build passes the system call numbers SYS_epoll_wait ... SYS_accept4 of this machine, the probe ids
 * PROBE_ITERATION and PROBE_ACCEPT, and BY_FENTRY; the loader fills `loops` with the threads to watch.
 */

BPF_HASH(loops, u32, struct loop_state, MAX_LOOPS);

#define REGS_DI __builtin_offsetof(struct pt_regs, di)

static __always_inline bool is_wait(u32 number)
{
	return number == SYS_epoll_wait || number == SYS_epoll_pwait || number == SYS_epoll_pwait2;
}

static __always_inline bool is_accept(u32 number)
{
	return number == SYS_accept || number == SYS_accept4;
}

/* Count an entry or a return that was not seen: kretprobes are few, and a kprobe is skipped in another one.
 */
static __always_inline void count_unseen(u32 number)
{
	struct probe_counters *counter = counters_of(is_wait(number) ? PROBE_ITERATION : PROBE_ACCEPT);

	COUNT(lost_starts, 1);
}

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

/* The system call `number` begins; `regs` is the address of the caller's registers. */
static __always_inline int loop_enters(bool fentry, u32 number, u64 regs)
{
	u64 pid_tid = bpf_get_current_pid_tgid();
	u32 tid = pid_tid;
	struct loop_state *loop = loops.lookup(&tid);

	if (!loop)
		return 0;
	u64 now_ns = bpf_ktime_get_ns();

	if (loop->syscall)
		count_unseen(loop->syscall);
	loop->syscall = number;
	if (is_wait(number)) {
		if (loop->wait_end_ns)
			end_iteration(loop, pid_tid, now_ns);
		return 0;
	}
	u64 fd = 0;

	if (fentry)
		fd = *(u64 *)(regs + REGS_DI);
	else
		read_kernel(&fd, sizeof(fd), (void *)(regs + REGS_DI));
	loop->listener_fd = fd;
	loop->accept_ns = now_ns;
	return 0;
}

/* A system call returns: `number`, or 0 where only the entry knew which. */
static __always_inline int loop_leaves(u32 number, s64 result)
{
	u64 pid_tid = bpf_get_current_pid_tgid();
	u32 tid = pid_tid;
	struct loop_state *loop = loops.lookup(&tid);

	if (!loop)
		return 0;
	if (number && loop->syscall != number) {
		/* its entry was not seen: it began before the thread was watched, or an iteration ended
		 * unseen */
		if (!is_wait(number) || !loop->wait_end_ns)
			return 0;
		count_unseen(number);
		loop->syscall = number;
	}
	number = loop->syscall;
	if (!number)
		return 0;
	u64 now_ns = bpf_ktime_get_ns();

	loop->syscall = 0;
	if (is_wait(number)) {
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

int loop_sys_enter(struct bpf_raw_tracepoint_args *ctx)
{
	u64 number = ctx->args[1];

	if (!is_wait(number) && !is_accept(number))
		return 0;
	return loop_enters(false, number, ctx->args[0]);
}

int loop_sys_exit(struct bpf_raw_tracepoint_args *ctx)
{
	return loop_leaves(0, ctx->args[1]);
}

/*
 * One line of these per hooked function follows. Each takes one argument, the caller's registers (Linux
 * arch/x86/include/asm/syscall_wrapper.h), and an fexit finds the result behind it. By a tracing program's
 * name bcc finds the function to attach to.
 */
#define HOOK_ENTRY(name, number)                                                                          \
	int name(void *ctx)                                                                               \
	{                                                                                                 \
		return loop_enters(BY_FENTRY, number,                                                     \
				   BY_FENTRY ? ((u64 *)ctx)[0] : PT_REGS_PARM1(((struct pt_regs *)ctx))); \
	}
#define HOOK_RETURN(name, number)                                                                      \
	int name(void *ctx)                                                                            \
	{                                                                                              \
		return loop_leaves(number,                                                             \
				   BY_FENTRY ? ((u64 *)ctx)[1] : PT_REGS_RC(((struct pt_regs *)ctx))); \
	}
