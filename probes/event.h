/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The wire record: what a probe sends, what waits in the ring buffer, and what one row of a recording is.
 * It is declared here and nowhere else: tracer/layout.py derives its numpy dtype from this text, and the
 * loader compares that with what the compiler made of it. 56 bytes and the ring buffer's 8-byte header
 * are one cache line, and every record has this size: so all waiting records are one array.
 */
#pragma once

struct event {
	u64 start_ns;	 /* CLOCK_MONOTONIC at the call's entry, or of the instant */
	u64 duration_ns; /* of the span; 0 for an instant; UNFINISHED_NS when it had not ended */
	u64 value[3];	 /* decoded arguments; the recording's probe list says what each one means */
	u32 pid;	 /* process (thread group) in the initial pid namespace */
	u32 tid;	 /* thread */
	u16 probe;	 /* index into the recording's probe list */
	u16 cpu;	 /* where the span ended */
	s32 stack;	 /* stack id, or -1 */
};

/*
 * What one probe did, one for each CPU; only ever added to. Exact even when the records themselves were lost.
 * The consumer maps them: reading is no system call.
 */
struct probe_counters {
	u64 hits;	 /* entries seen */
	u64 sent;	 /* records put into the ring buffer */
	u64 short_calls; /* ended below the minimum duration: counted, not sent */
	u64 short_ns;	 /* total duration of those */
	u64 lost;	 /* records the full ring buffer refused */
	u64 lost_starts; /* entries for which no place was free; their returns count as unpaired */
	u64 unpaired;	 /* returns whose entry is unknown */
	u64 abandoned;	 /* entries overwritten by a later one in the same frame: the call never returned */
	u64 thinned;	 /* not sent because more came per second than the limit allows; counted in hits */
};

/* What identifies a call in progress: its thread, its probe, and the stack pointer on entry. */
struct frame {
	u64 sp;
	u32 tid;
	u32 probe;
};

/* The thread that runs an event loop, filled in by the loader, kept by loop.bpf.c. */
struct loop_state {
	u64 wait_end_ns; /* when epoll_wait last returned; 0 while it waits */
	u64 accept_ns;	 /* when the accept in progress was entered */
	u64 ready;	 /* file descriptors that the wait returned */
	u64 accepted;	 /* connections accepted since */
	u32 syscall;	 /* the watched system call in progress, 0 for none */
	u32 listener_fd; /* of the accept in progress */
};

/*
 * A thread whose stacks are sampled, filled in by the loader: one sample for each period_ns on the CPU, and
 * one for each period_ns off it, while its event loop iteration has lasted after_ns (0: always). Absences of
 * asleep_ns count in every iteration.
 */
struct sampled_thread {
	u64 after_ns;
	u64 asleep_ns;
	u64 period_ns;
	u64 unsampled_ns; /* off the CPU, since the last sample of that */
};

/*
 * One sample of a thread's stacks, in a ring buffer of its own: on the CPU (duration_ns is 0) or off it, from
 * the switch to the next thread until the switch back.
 */
struct stack_sample {
	u64 time_ns;	 /* CLOCK_MONOTONIC of the sample, or when the thread left the CPU */
	u64 duration_ns; /* off the CPU */
	u64 weight_ns;	 /* what it stands for: the period, or the absences since the last sample of one */
	u32 pid;
	u32 tid;
	s32 kernel_stack; /* id in the map kernel_stacks, or negative: none, or no place for it */
	u32 state;	  /* of the task when it left the CPU, 0: it still wanted to run; or STATE_ON_CPU */
	u32 cpu;
	u32 length; /* bytes of the user stack that could be read */
	/*
	 * A uretprobe puts the address of its trampoline in place of the return address: where that is in the
	 * thread's memory (0: no more), and what it was, innermost call first.
	 */
	u64 trampoline; /* the page of it; 0: the process has none */
	u64 probed_ip;	/* the instruction that a uprobe steps over out of line */
	u64 return_slot[16];
	u64 return_address[16];
	u64 registers[17]; /* DWARF numbers 0 to 15, and the program counter */
	u8 stack[24576];   /* from the stack pointer up; Redis 7 has frames of 16 KB */
};

#define STATE_ON_CPU 0x80000000U

/* What the hooked functions were seen to add to the TcpExt counters of a network namespace. */
struct counted_requests {
	u64 overflows;	  /* ListenOverflows */
	u64 drops;	  /* ListenDrops */
	u64 full_cookies; /* TCPReqQFullDoCookies */
};

/* Whose requests: a network namespace's, by its inode, at listeners that are watched (1) or not (0). */
struct requests_of {
	u32 namespace;
	u32 watched;
};

/* A listening socket to watch, by its socket cookie; filled in by the loader. */
struct watched_listener {
	u32 index; /* in the recording's list of listeners */
	u32 pid;
};

/* A connection that waits in an accept queue, by the address of its socket. */
struct waiting_connection {
	u64 enqueued_ns;
	u64 listener; /* struct sock * */
	u32 index;
	u32 pid;
};

/*
 * What listener.bpf.c sends, as offsets from PROBE_LISTENER. All have the same values: value[0] accept queue
 * length, its limit and the peer's port; value[1] and [2] the peer's IPv6 address (IPv4 mapped); tid the
 * index of the listener; stack the length of the SYN queue.
 */
enum listener_event {
	SYN_TAKEN,
	SYN_REFUSED_ACCEPT_QUEUE_FULL,
	SYN_REFUSED_SYN_QUEUE_FULL,
	SYN_REFUSED_OTHERWISE,
	SYN_COOKIE_SENT,
	ACK_REFUSED_SILENTLY,
	ACK_REFUSED_WITH_RST,
	COOKIE_ACK_REFUSED,
	ACK_REFUSED_OTHERWISE,
	CONNECTION_ENQUEUED,
	CONNECTION_ACCEPTED, /* a span: from the enqueue to accept() */
	LISTENER_EVENTS,
};

#define UNFINISHED_NS (~0ULL)
#define NO_STACK      (-1)
