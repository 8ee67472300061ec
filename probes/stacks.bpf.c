/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The stacks of a thread whose event loop stalls: registers and the top of the user stack, to be unwound
 * outside the kernel (Redis has no frame pointers), and the id of the kernel's stack. On the CPU a perf event
 * of that thread takes them at a fixed rate; off the CPU sched_switch does, when the thread leaves, and sends
 * them when it comes back and the length of its absence is known.
 *
 * Joined behind loop.bpf.c, whose `loops` say since when an iteration lasts. The build passes PROBE_STACK,
 * STACK_RING_PAGES, MAX_KERNEL_STACKS, MAX_SAMPLED, and the offsets of the kernel's struct members: TASK_PID
 * ...
 */

#define KERNEL_FRAMES	  64
#define STACK_CHUNK_BYTES 1024
#define STACK_CHUNKS	  (sizeof(((struct stack_sample *)0)->stack) / STACK_CHUNK_BYTES)

#define RETURN_ADDRESSES \
	(sizeof(((struct stack_sample *)0)->return_slot) / sizeof(((struct stack_sample *)0)->return_slot[0]))

struct kernel_stack {
	u64 address[KERNEL_FRAMES];
};

BPF_RINGBUF_OUTPUT(stack_samples, STACK_RING_PAGES);
/* An id stays what it is: nothing is ever replaced, a stack that finds its place taken has none. */
BPF_F_TABLE("stacktrace", u32, struct kernel_stack, kernel_stacks, MAX_KERNEL_STACKS, 0);
BPF_HASH(sampled, u32, struct sampled_thread, MAX_SAMPLED);
/* Of each sampled thread the stack with which it left the CPU; filled in by the loader, because it is large.
 */
BPF_HASH(off_cpu, u32, struct stack_sample, MAX_SAMPLED);

static void *(*current_task)(void) = (void *)BPF_FUNC_get_current_task_btf;
static u64 (*current_task_address)(void) = (void *)BPF_FUNC_get_current_task;
static void *(*user_registers_of)(void *task) = (void *)BPF_FUNC_task_pt_regs;

/* Since when the thread's event loop iteration lasts, 0 while it waits for events. */
static __always_inline u64 iteration_since(u32 tid)
{
	struct loop_state *loop = loops.lookup(&tid);

	return loop ? loop->wait_end_ns : 0;
}

static __always_inline u64 word_at(u64 address)
{
	u64 word = 0;

	read_kernel(&word, sizeof(word), (void *)address);
	return word;
}

/* What uretprobes have put trampolines in place of: Linux include/linux/uprobes.h, struct return_instance. */
static __always_inline void copy_return_addresses(struct stack_sample *sample)
{
	u64 task = current_task_address();
	u64 utask = word_at(task + TASK_UTASK);
	u64 called = utask ? word_at(utask + UTASK_RETURN_INSTANCES) : 0;
	u64 area = utask ? word_at(word_at(task + TASK_MM) + MM_XOL_AREA) : 0;

	sample->trampoline = area ? word_at(area + XOL_AREA_VADDR) : 0;
	sample->probed_ip = utask ? word_at(utask + UTASK_VADDR) : 0;
#pragma unroll
	for (u32 i = 0; i < RETURN_ADDRESSES; i++) {
		sample->return_slot[i] = called ? word_at(called + RETURN_INSTANCE_STACK) : 0;
		sample->return_address[i] = called ? word_at(called + RETURN_INSTANCE_ORIG_RET_VADDR) : 0;
		called = called ? word_at(called + RETURN_INSTANCE_NEXT) : 0;
	}
}

/* The user's registers as they were on entry to the kernel, wherever in it the thread is now, and its stack.
 */
static __always_inline void copy_user_stack(struct stack_sample *sample)
{
	struct pt_regs regs = {};
	u64 pid_tid = bpf_get_current_pid_tgid();

	sample->pid = pid_tid >> 32;
	sample->tid = (u32)pid_tid;
	sample->cpu = bpf_get_smp_processor_id();
	read_kernel(&regs, sizeof(regs), user_registers_of(current_task()));
	sample->registers[0] = regs.ax;
	sample->registers[1] = regs.dx;
	sample->registers[2] = regs.cx;
	sample->registers[3] = regs.bx;
	sample->registers[4] = regs.si;
	sample->registers[5] = regs.di;
	sample->registers[6] = regs.bp;
	sample->registers[7] = regs.sp;
	sample->registers[8] = regs.r8;
	sample->registers[9] = regs.r9;
	sample->registers[10] = regs.r10;
	sample->registers[11] = regs.r11;
	sample->registers[12] = regs.r12;
	sample->registers[13] = regs.r13;
	sample->registers[14] = regs.r14;
	sample->registers[15] = regs.r15;
	sample->registers[16] = regs.ip;

	copy_return_addresses(sample);
	sample->length = 0;
	/* by chunks, because a read that goes beyond the end of the stack fails as a whole */
#pragma unroll
	for (u32 i = 0; i < STACK_CHUNKS; i++) {
		if (read_user(sample->stack + i * STACK_CHUNK_BYTES, STACK_CHUNK_BYTES,
			      (void *)(regs.sp + i * STACK_CHUNK_BYTES)))
			break;
		sample->length += STACK_CHUNK_BYTES;
	}
}

int stack_on_cpu(struct bpf_perf_event_data *ctx)
{
	u32 tid = (u32)bpf_get_current_pid_tgid();
	struct sampled_thread *thread = sampled.lookup(&tid);

	if (!thread)
		return 0;
	u64 now_ns = bpf_ktime_get_ns();

	if (thread->after_ns) {
		u64 since_ns = iteration_since(tid);

		if (!since_ns || now_ns - since_ns < thread->after_ns)
			return 0;
	}

	struct probe_counters *counter = counters_of(PROBE_STACK);
	struct stack_sample *sample = stack_samples.ringbuf_reserve(sizeof(struct stack_sample));

	COUNT(hits, 1);
	if (!sample) {
		COUNT(lost, 1);
		return 0;
	}
	sample->time_ns = now_ns;
	sample->duration_ns = 0;
	sample->weight_ns = thread->period_ns;
	sample->state = STATE_ON_CPU;
	sample->kernel_stack = kernel_stacks.get_stackid(ctx, 0);
	copy_user_stack(sample);
	stack_samples.ringbuf_submit(sample, BPF_RB_NO_WAKEUP);
	COUNT(sent, 1);
	return 0;
}

/*
 * Sees every switch of the host: leaves after one look-up for the thread that goes and one for the one that
 * comes. The task's state is read, not taken from the arguments: those have it since Linux commit
 * 9c2136be0878, v5.19.
 */
int stack_switched(struct bpf_raw_tracepoint_args *ctx)
{
	u32 tid = (u32)bpf_get_current_pid_tgid();
	struct stack_sample *sample = off_cpu.lookup(&tid);

	if (sample) {
		sample->time_ns = 0;
		/* waiting for events is no stall */
		if (iteration_since(tid)) {
			sample->state = 0;
			read_kernel(&sample->state, sizeof(sample->state), (char *)ctx->args[1] + TASK_STATE);
			sample->kernel_stack = kernel_stacks.get_stackid(ctx, 0);
			copy_user_stack(sample);
			sample->time_ns = bpf_ktime_get_ns();
		}
	}

	read_kernel(&tid, sizeof(tid), (char *)ctx->args[2] + TASK_PID);
	sample = off_cpu.lookup(&tid);
	if (!sample || !sample->time_ns)
		return 0;

	struct sampled_thread *thread = sampled.lookup(&tid);
	struct probe_counters *counter = counters_of(PROBE_STACK);
	u64 now_ns = bpf_ktime_get_ns();
	u64 since_ns = iteration_since(tid);

	sample->duration_ns = now_ns - sample->time_ns;
	/* not a short absence in an iteration that is no stall yet */
	if (thread && since_ns &&
	    (sample->duration_ns >= thread->asleep_ns || now_ns - since_ns >= thread->after_ns))
		thread->unsampled_ns += sample->duration_ns;
	if (thread && thread->unsampled_ns >= thread->period_ns) {
		sample->weight_ns = thread->unsampled_ns;
		thread->unsampled_ns = 0;
		COUNT(hits, 1);
		if (stack_samples.ringbuf_output(sample, sizeof(*sample), BPF_RB_NO_WAKEUP) == 0)
			COUNT(sent, 1);
		else
			COUNT(lost, 1);
	}
	sample->time_ns = 0;
	return 0;
}
