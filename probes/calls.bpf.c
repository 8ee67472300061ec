/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Calls of a function: uprobe on entry, uretprobe on return, one record per finished call.
 *
 * A call is known by its thread, its probe and its frame: the stack pointer on entry points at the
 * return address, and on return it is just above it. So nested and recursive calls pair exactly
 * without a stack of our own, a frame left by longjmp is overwritten by the next call that uses it
 * (counted as abandoned) and never confuses another, and a return whose entry was before the attach
 * finds nothing. Tail calls share the frame but not the probe.
 */

BPF_HASH(calls_in_progress, struct frame, struct event, MAX_CALLS_IN_PROGRESS);

static __always_inline int call_enter(struct pt_regs *ctx, u16 probe, u64 *value)
{
	u64 pid_tid = bpf_get_current_pid_tgid();
	struct frame frame = {.sp = PT_REGS_SP(ctx), .tid = (u32)pid_tid, .probe = probe};
	struct event call = {
		.value = {value[0], value[1], value[2]},
		.pid = pid_tid >> 32,
		.tid = (u32)pid_tid,
		.probe = probe,
		.stack = NO_STACK,
	};
	struct probe_counters *counter = counters_of(probe);

	COUNT(hits, 1);
	call.start_ns = bpf_ktime_get_ns();
	if (calls_in_progress.insert(&frame, &call) == 0)
		return 0;
	if (calls_in_progress.lookup(&frame)) {
		COUNT(abandoned, 1);
		calls_in_progress.update(&frame, &call);
	} else {
		COUNT(lost_starts, 1);
	}
	return 0;
}

static __always_inline int call_return(struct pt_regs *ctx, u16 probe, bool keep_result)
{
	u64 now_ns = bpf_ktime_get_ns();
	/* x86-64: ret has popped the return address that the entry's stack pointer pointed at. */
	struct frame frame = {
		.sp = PT_REGS_SP(ctx) - sizeof(u64),
		.tid = (u32)bpf_get_current_pid_tgid(),
		.probe = probe,
	};
	struct event *started = calls_in_progress.lookup(&frame);

	if (!started) {
		struct probe_counters *counter = counters_of(probe);

		COUNT(unpaired, 1);
		return 0;
	}
	struct event call = *started;

	if (keep_result)
		call.value[2] = PT_REGS_RC(ctx);
	calls_in_progress.delete(&frame);
	send_span(&call, now_ns, MIN_DURATION_NS);
	return 0;
}

/* How arguments become values. Reads fail softly: a bad pointer leaves zeros. */

static __always_inline u64 argument(struct pt_regs *ctx, int number)
{
	switch (number) {
	case 1:
		return PT_REGS_PARM1(ctx);
	case 2:
		return PT_REGS_PARM2(ctx);
	case 3:
		return PT_REGS_PARM3(ctx);
	case 4:
		return PT_REGS_PARM4(ctx);
	case 5:
		return PT_REGS_PARM5(ctx);
	case 6:
		return PT_REGS_PARM6(ctx);
	}
	return 0;
}

/* Redis up to 3.0: struct sdshdr { unsigned int len; unsigned int free; char buf[]; } */
static __always_inline void read_sdshdr(u64 sds, u64 *length_bytes, u64 *free_bytes)
{
	u32 header[2] = {};

	if (read_user(header, sizeof(header), (void *)(sds - sizeof(header))))
		return;
	*length_bytes = header[0];
	*free_bytes = header[1];
}

/*
 * Redis 3.2 and later (antirez/sds commit e97d0a8 in 3.2): { len; alloc; u8 flags; char buf[]; } with
 * 8, 16, 32 or 64 bits for len and alloc, packed; type 0 has no alloc and its length in the flags.
 */
static __always_inline void read_sds(u64 sds, u64 *length_bytes, u64 *free_bytes)
{
	u8 flags = 0;
	u8 b[2] = {};
	u16 h[2] = {};
	u32 w[2] = {};
	u64 d[2] = {};

	if (read_user(&flags, sizeof(flags), (void *)(sds - 1)))
		return;
	switch (flags & 7) {
	case 0:
		*length_bytes = flags >> 3;
		*free_bytes = 0;
		return;
	case 1:
		read_user(b, sizeof(b), (void *)(sds - 1 - sizeof(b)));
		*length_bytes = b[0];
		*free_bytes = (u8)(b[1] - b[0]);
		return;
	case 2:
		read_user(h, sizeof(h), (void *)(sds - 1 - sizeof(h)));
		*length_bytes = h[0];
		*free_bytes = (u16)(h[1] - h[0]);
		return;
	case 3:
		read_user(w, sizeof(w), (void *)(sds - 1 - sizeof(w)));
		*length_bytes = w[0];
		*free_bytes = (u32)(w[1] - w[0]);
		return;
	case 4:
		read_user(d, sizeof(d), (void *)(sds - 1 - sizeof(d)));
		*length_bytes = d[0];
		*free_bytes = d[1] - d[0];
		return;
	}
}

static __always_inline void read_any_sds(int sds_kind, u64 sds, u64 *length_bytes, u64 *free_bytes)
{
	if (sds_kind)
		read_sds(sds, length_bytes, free_bytes);
	else
		read_sdshdr(sds, length_bytes, free_bytes);
}

/* struct client: value[0] = id | last interaction (wall-clock s) << 32, [1] = allocated, [2] = free bytes. */
static __always_inline void read_client(u64 client, int id_offset, int id_size, int querybuf_offset,
					int lastinteraction_offset, int sds_kind, u64 *value)
{
	u32 id = 0;
	u64 last_interaction_s = 0;
	u64 querybuf = 0;
	u64 length_bytes = 0;
	u64 free_bytes = 0;

	/* little-endian: the low half of a 64-bit id comes first, so four bytes serve both sizes */
	read_user(&id, sizeof(id), (void *)(client + id_offset));
	if (lastinteraction_offset >= 0)
		read_user(&last_interaction_s, sizeof(last_interaction_s),
			  (void *)(client + lastinteraction_offset));
	read_user(&querybuf, sizeof(querybuf), (void *)(client + querybuf_offset));
	if (querybuf)
		read_any_sds(sds_kind, querybuf, &length_bytes, &free_bytes);
	value[0] = id | last_interaction_s << 32;
	value[1] = length_bytes + free_bytes;
	value[2] = free_bytes;
}

/*
 * One line of these per probe follows, written by the loader (tracer/capture/program.py).
 * `id` is the index into the recording's probe list.
 */
#define CALL_RETURN(id, keep_result)                      \
	int call_return_##id(struct pt_regs *ctx)         \
	{                                                 \
		return call_return(ctx, id, keep_result); \
	}

#define CALL_ENTER(id, decode)                     \
	int call_enter_##id(struct pt_regs *ctx)   \
	{                                          \
		u64 value[3] = {};                 \
                                                   \
		decode;                            \
		return call_enter(ctx, id, value); \
	}

#define DECODE_none()	(void)0
#define DECODE_result() (void)0
#define DECODE_registers(first, second, third) \
	value[0] = argument(ctx, first), value[1] = argument(ctx, second), value[2] = argument(ctx, third)
#define DECODE_sdshdr(number) read_sdshdr(argument(ctx, number), &value[0], &value[1])
#define DECODE_sds(number)    read_sds(argument(ctx, number), &value[0], &value[1])
#define DECODE_client(number, id_offset, id_size, querybuf_offset, lastinteraction_offset, sds_kind)    \
	read_client(argument(ctx, number), id_offset, id_size, querybuf_offset, lastinteraction_offset, \
		    sds_kind, value)
