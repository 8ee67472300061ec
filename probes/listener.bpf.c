/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Every connection request that reaches a watched listener, and what became of it.
 *
 * A connection is refused in two places (Linux net/ipv4/tcp_input.c, tcp_ipv4.c, tcp_ipv6.c):
 * at the SYN in tcp_conn_request, and at the third ACK in tcp_v4/v6_syn_recv_sock, which is reached from
 * tcp_check_req or, for a SYN cookie, from cookie_v4/v6_check. None tells its caller why, but each adds to
 * this CPU's share of its namespace's counters: what a counter gained between entry and return is the
 * kernel's own verdict, whatever the queues looked like when the function was entered. Nothing else on this
 * CPU can add to them meanwhile, because all run with softirqs off.
 * tcp_v4/v6_syn_recv_sock themselves are left alone: from 6.1.192 on they have more arguments than fentry can
 * pass on 6.1, and a kprobe does not run while this CPU is in a bpf(2) call that reads a map.
 *
 * The build passes the offsets of all members as SOCK_... etc. and the numbers of the counters (from BTF),
 * the address of the kernel's PER_CPU_OFFSETS, PROBE_LISTENER, and LISTENER_EVENTS_PER_WINDOW. One body
 * serves kprobe and fentry: see the list at the end.
 *
 * Helpers are what a probe costs: so fentry's arguments are read without one, the counters are read in two
 * stretches, and at the return only as far as it takes.
 */

#define WINDOW_NS   100000000ULL
#define ETH_P_IP    0x0800
#define AF_INET	    2
#define AT_SYN	    0
#define AT_ACK	    1
#define IPV4_MAPPED 0x0000ffff00000000ULL

struct bucket {
	u64 window_start_ns;
	u64 sent;
};

/* The kernel's counters that tell a verdict lie in two stretches, the second for a full SYN queue. */
struct verdict_counters {
	u64 counter[VERDICT_COUNTERS];
};
struct full_counters {
	u64 counter[FULL_COUNTERS];
};

/* The function that is running on this CPU, and what the counters were when it was entered. */
struct decision {
	u64 cpu_offset; /* of this CPU's share of anything per CPU; found once */
	u64 share;	/* address of this CPU's share of the namespace's counters */
	struct verdict_counters before;
	struct full_counters full_before;
	struct event event;
	u64 sk; /* for a kretprobe, which has no arguments */
	u64 skb;
	bool watched;
	bool active;
};

BPF_HASH(listeners, u64, struct watched_listener, MAX_LISTENERS);
BPF_TABLE("lru_hash", u64, struct waiting_connection, waiting_connections, MAX_WAITING);
BPF_PERCPU_ARRAY(buckets, struct bucket, LISTENER_EVENTS);
BPF_PERCPU_ARRAY(decisions, struct decision, 2); /* AT_SYN, AT_ACK */
BPF_PERCPU_ARRAY(in_hashdance, bool, 1);	 /* is this CPU in inet_csk_complete_hashdance? */
BPF_HASH(counted_requests, struct requests_of, struct counted_requests, MAX_NAMESPACES);

#define READ(type, address)                                            \
	({                                                             \
		type read_ = 0;                                        \
		read_kernel(&read_, sizeof(read_), (void *)(address)); \
		read_;                                                 \
	})

/* A member of an object that is an argument or a result: fentry may read it directly, the verifier knows its
 * type. */
#define MEMBER(type, object, offset) \
	(fentry ? *(type *)((object) + (offset)) : READ(type, (object) + (offset)))

/* A copy of an object's address for use as a key; kept apart, the verifier goes on knowing the object's type.
 */
static __always_inline u64 key_of(u64 object)
{
	asm volatile("" : "+r"(object));
	return object;
}

static __always_inline struct watched_listener *watched(bool fentry, u64 sk)
{
	u64 cookie = MEMBER(u64, sk, SOCK_COMMON_SKC_COOKIE);

	return listeners.lookup(&cookie);
}

static __always_inline void describe_queue(bool fentry, struct event *event, u64 sk, u16 peer_port)
{
	u64 length = MEMBER(u32, sk, SOCK_SK_ACK_BACKLOG);
	u64 limit = MEMBER(u32, sk, SOCK_SK_MAX_ACK_BACKLOG);

	event->value[0] = (length & 0xffffff) | (limit & 0xffffff) << 24 | (u64)peer_port << 48;
	/* beyond struct sock, in the socket that it is the head of */
	event->stack = READ(s32, sk + INET_CONNECTION_SOCK_ICSK_ACCEPT_QUEUE_QLEN);
}

/* An IPv6 address as two numbers, so that the first eight bytes are the high one. */
static __always_inline void describe_ipv6(struct event *event, u64 address)
{
	u64 halves[2] = {};

	read_kernel(halves, sizeof(halves), (void *)address);
	event->value[1] = __builtin_bswap64(halves[0]);
	event->value[2] = __builtin_bswap64(halves[1]);
}

/* The listener's side of a packet: its queue, and who sent it. */
static __always_inline void describe_packet(bool fentry, struct event *event, u64 sk, u64 skb)
{
	u64 head = MEMBER(u64, skb, SK_BUFF_HEAD);
	u64 network = head + MEMBER(u16, skb, SK_BUFF_NETWORK_HEADER);
	u64 transport = head + MEMBER(u16, skb, SK_BUFF_TRANSPORT_HEADER);

	describe_queue(fentry, event, sk, __builtin_bswap16(READ(u16, transport + TCPHDR_SOURCE)));
	if (MEMBER(u16, skb, SK_BUFF_PROTOCOL) == __builtin_bswap16(ETH_P_IP))
		event->value[2] = IPV4_MAPPED | __builtin_bswap32(READ(u32, network + IPHDR_SADDR));
	else
		describe_ipv6(event, network + IPV6HDR_SADDR);
}

/* The listener's side of a finished connection. */
static __always_inline void describe_connection(bool fentry, struct event *event, u64 listener, u64 child)
{
	u16 port = __builtin_bswap16(MEMBER(u16, child, SOCK_COMMON_SKC_DPORT));

	describe_queue(fentry, event, listener, port);
	if (MEMBER(u16, child, SOCK_COMMON_SKC_FAMILY) == AF_INET)
		event->value[2] = IPV4_MAPPED | __builtin_bswap32(MEMBER(u32, child, SOCK_COMMON_SKC_DADDR));
	else
		describe_ipv6(event, child + SOCK_COMMON_SKC_V6_DADDR);
}

/* A token bucket for each kind of event: a flood is counted to the last packet, and sent in part. */
static __always_inline void send_bounded(struct event *event, u32 kind, u64 now_ns)
{
	struct probe_counters *counter = counters_of(PROBE_LISTENER + kind);
	struct bucket *bucket = buckets.lookup(&kind);

	event->probe = PROBE_LISTENER + kind;
	COUNT(hits, 1);
	if (!bucket)
		return;
	if (now_ns - bucket->window_start_ns >= WINDOW_NS) {
		bucket->window_start_ns = now_ns;
		bucket->sent = 0;
	}
	if (bucket->sent >= LISTENER_EVENTS_PER_WINDOW) {
		COUNT(thinned, 1);
		return;
	}
	bucket->sent++;
	send(event, counter);
}

static __always_inline void read_verdict(struct decision *decision, struct verdict_counters *into)
{
	read_kernel(into, sizeof(*into), (void *)(decision->share + VERDICT_FIRST * sizeof(u64)));
}

static __always_inline void read_full(struct decision *decision, struct full_counters *into)
{
	read_kernel(into, sizeof(*into), (void *)(decision->share + FULL_FIRST * sizeof(u64)));
}

#define GAINED(after, before, first, number) \
	((after).counter[(number) - (first)] - (before).counter[(number) - (first)])
#define VERDICT_GAINED(name) GAINED(now, decision->before, VERDICT_FIRST, name)
#define FULL_GAINED(name)    GAINED(full, decision->full_before, FULL_FIRST, name)

/* Remember the counters as they are; returns the decision when its listener is watched, else NULL. */
static __always_inline struct decision *request_arrives(bool fentry, u32 at, u64 sk, u64 skb)
{
	struct decision *decision = decisions.lookup(&at);
	struct watched_listener *listener = watched(fentry, sk);

	if (!decision)
		return 0;
	if (!decision->cpu_offset)
		decision->cpu_offset = READ(u64, PER_CPU_OFFSETS + bpf_get_smp_processor_id() * sizeof(u64));
	u64 namespace = MEMBER(u64, sk, SOCK_COMMON_SKC_NET);

	/* read by a helper: the verifier lets nothing be added to a pointer whose type it knows */
	decision->share =
		READ(u64, namespace + NET_MIB_NET_STATISTICS) + decision->cpu_offset + LINUX_MIB_MIBS;
	read_verdict(decision, &decision->before);
	if (at == AT_SYN)
		read_full(decision, &decision->full_before);
	if (!fentry) {
		decision->sk = sk;
		decision->skb = skb;
	}
	decision->watched = listener;
	decision->active = true;
	if (!listener)
		return 0;
	__builtin_memset(&decision->event, 0, sizeof(decision->event));
	decision->event.pid = listener->pid;
	decision->event.tid = listener->index;
	return decision;
}

/* Return the decision that ends here, else NULL. */
static __always_inline struct decision *decided(u32 at)
{
	struct decision *decision = decisions.lookup(&at);

	if (!decision || !decision->active)
		return 0;
	decision->active = false;
	return decision;
}

/* Add what this function added to the namespace's counters to our own, so that both can be compared. */
static __always_inline void count_request(bool fentry, u64 sk, bool at_watched,
					  struct counted_requests *gained)
{
	struct requests_of whose = {.watched = at_watched};
	struct counted_requests *total, none = {};
	u64 namespace = MEMBER(u64, sk, SOCK_COMMON_SKC_NET);

	whose.namespace = MEMBER(u32, namespace, NET_NS_INUM);
	total = counted_requests.lookup_or_try_init(&whose, &none);
	if (!total)
		return;
	__sync_fetch_and_add(&total->overflows, gained->overflows);
	__sync_fetch_and_add(&total->drops, gained->drops);
	__sync_fetch_and_add(&total->full_cookies, gained->full_cookies);
}

static __always_inline int syn_arrives(bool fentry, u64 sk, u64 skb)
{
	struct decision *decision = request_arrives(fentry, AT_SYN, sk, skb);

	if (!decision)
		return 0;
	decision->event.start_ns = bpf_ktime_get_ns();
	describe_packet(fentry, &decision->event, sk, skb);
	return 0;
}

static __always_inline int syn_is_decided(bool fentry, u64 fentry_sk)
{
	struct decision *decision = decided(AT_SYN);
	struct verdict_counters now;
	struct full_counters full;
	u32 kind = SYN_TAKEN;

	if (!decision)
		return 0;
	read_verdict(decision, &now);
	bool overflowed = VERDICT_GAINED(LINUX_MIB_LISTENOVERFLOWS),
	     dropped = VERDICT_GAINED(LINUX_MIB_LISTENDROPS);
	bool cookie = VERDICT_GAINED(LINUX_MIB_SYNCOOKIESSENT);

	if (dropped || cookie) {
		read_full(decision, &full);
		struct counted_requests gained = {overflowed, dropped,
						  FULL_GAINED(LINUX_MIB_TCPREQQFULLDOCOOKIES)};

		count_request(fentry, fentry ? fentry_sk : decision->sk, decision->watched, &gained);
		if (overflowed)
			kind = SYN_REFUSED_ACCEPT_QUEUE_FULL;
		else if (!dropped)
			kind = SYN_COOKIE_SENT;
		else if (FULL_GAINED(LINUX_MIB_TCPREQQFULLDROP))
			kind = SYN_REFUSED_SYN_QUEUE_FULL;
		else
			kind = SYN_REFUSED_OTHERWISE;
	}
	if (decision->watched)
		send_bounded(&decision->event, kind, decision->event.start_ns);
	return 0;
}

/*
 * tcp_check_req answers a refusal with RST or not at all, by sysctl; cookie_v4/v6_check never answer. What
 * they return is the new connection, or the listener for a packet that is not theirs; NULL when it was
 * refused.
 */
static __always_inline int ack_is_decided(bool fentry, u64 fentry_sk, u64 fentry_skb, u64 result, bool cookie)
{
	struct decision *decision = decided(AT_ACK);
	struct verdict_counters now;
	u32 kind = ACK_REFUSED_OTHERWISE;

	if (!decision || result)
		return 0;
	read_verdict(decision, &now);
	if (!VERDICT_GAINED(LINUX_MIB_LISTENDROPS))
		return 0;
	bool overflowed = VERDICT_GAINED(LINUX_MIB_LISTENOVERFLOWS);
	struct counted_requests gained = {overflowed, true, 0};
	u64 sk = fentry ? fentry_sk : decision->sk;

	count_request(fentry, sk, decision->watched, &gained);
	if (!decision->watched)
		return 0;
	if (overflowed) {
		if (cookie)
			kind = COOKIE_ACK_REFUSED;
		else if (VERDICT_GAINED(LINUX_MIB_EMBRYONICRSTS))
			kind = ACK_REFUSED_WITH_RST;
		else
			kind = ACK_REFUSED_SILENTLY;
	}
	decision->event.start_ns = bpf_ktime_get_ns();
	describe_packet(fentry, &decision->event, sk, fentry ? fentry_skb : decision->skb);
	send_bounded(&decision->event, kind, decision->event.start_ns);
	return 0;
}

static __always_inline int set_in_hashdance(bool in)
{
	u32 zero = 0;
	bool *place = in_hashdance.lookup(&zero);

	if (place)
		*place = in;
	return 0;
}

static __always_inline int connection_waits(bool fentry, u64 sk, u64 child)
{
	struct watched_listener *listener = watched(fentry, sk);

	if (!listener)
		return 0;
	u64 key = key_of(child);
	struct waiting_connection waiting = {
		.enqueued_ns = bpf_ktime_get_ns(),
		.listener = sk,
		.index = listener->index,
		.pid = listener->pid,
	};
	struct event event = {
		.start_ns = waiting.enqueued_ns,
		.pid = listener->pid,
		.tid = listener->index,
	};

	describe_connection(fentry, &event, sk, child);
	event.value[0]++; /* its length with this connection */
	waiting_connections.update(&key, &waiting);
	send_bounded(&event, CONNECTION_ENQUEUED, waiting.enqueued_ns);
	return 0;
}

/*
 * inet_csk_complete_hashdance puts an ordinary connection into the queue, by inet_csk_reqsk_queue_add, which
 * the compiler may have made a part of it; a cookie's connection goes there directly.
 */
static __always_inline int hashdance_begins(bool fentry, u64 sk, u64 child, bool own_request)
{
	set_in_hashdance(true);
	return own_request ? connection_waits(fentry, sk, child) : 0;
}

static __always_inline int connection_is_added(bool fentry, u64 sk, u64 child)
{
	u32 zero = 0;
	bool *place = in_hashdance.lookup(&zero);

	return place && *place ? 0 : connection_waits(fentry, sk, child);
}

static __always_inline int connection_is_accepted(bool fentry, u64 fentry_sk, u64 child)
{
	u64 key = key_of(child);
	struct waiting_connection *waiting = waiting_connections.lookup(&key);

	if (!waiting)
		return 0;
	u64 now_ns = bpf_ktime_get_ns();
	struct event event = {
		.start_ns = waiting->enqueued_ns,
		.duration_ns = now_ns - waiting->enqueued_ns,
		.pid = waiting->pid,
		.tid = waiting->index,
	};

	describe_connection(fentry, &event, fentry ? fentry_sk : waiting->listener, child);
	waiting_connections.delete(&key);
	send_bounded(&event, CONNECTION_ACCEPTED, now_ns);
	return 0;
}

/*
 * Where each function is hooked, one line a program. The build chooses for each function f whether it is
 * kprobe and kretprobe (USES_FENTRY_f 0) or fentry and fexit (1), and passes the names ENTER_f and RETURN_f:
 * by a tracing program's name bcc finds the function to attach to. An fexit finds the arguments again
 * (GIVEN), and behind them, ARGUMENTS_f by BTF, the result.
 */
#define ON_ENTRY(function, call)                            \
	int ENTER_##function(void *ctx)                     \
	{                                                   \
		const bool fentry = USES_FENTRY_##function; \
                                                            \
		return call;                                \
	}
#define ON_RETURN(function, call)                           \
	int RETURN_##function(void *ctx)                    \
	{                                                   \
		const bool fentry = USES_FENTRY_##function; \
                                                            \
		return call;                                \
	}
#define ARGUMENT(number) (fentry ? ((u64 *)ctx)[number - 1] : PT_REGS_PARM##number(((struct pt_regs *)ctx)))
#define GIVEN(number)	 (fentry ? ((u64 *)ctx)[number - 1] : 0)
#define RESULT(function) (fentry ? ((u64 *)ctx)[ARGUMENTS_##function] : PT_REGS_RC(((struct pt_regs *)ctx)))

ON_ENTRY(tcp_conn_request, syn_arrives(fentry, ARGUMENT(3), ARGUMENT(4)))
ON_RETURN(tcp_conn_request, syn_is_decided(fentry, GIVEN(3)))
ON_ENTRY(tcp_check_req, (request_arrives(fentry, AT_ACK, ARGUMENT(1), ARGUMENT(2)), 0))
ON_RETURN(tcp_check_req, ack_is_decided(fentry, GIVEN(1), GIVEN(2), RESULT(tcp_check_req), false))
ON_ENTRY(cookie_v4_check, (request_arrives(fentry, AT_ACK, ARGUMENT(1), ARGUMENT(2)), 0))
ON_RETURN(cookie_v4_check, ack_is_decided(fentry, GIVEN(1), GIVEN(2), RESULT(cookie_v4_check), true))
ON_ENTRY(cookie_v6_check, (request_arrives(fentry, AT_ACK, ARGUMENT(1), ARGUMENT(2)), 0))
ON_RETURN(cookie_v6_check, ack_is_decided(fentry, GIVEN(1), GIVEN(2), RESULT(cookie_v6_check), true))
ON_ENTRY(inet_csk_complete_hashdance, hashdance_begins(fentry, ARGUMENT(1), ARGUMENT(2), (u8)ARGUMENT(4)))
ON_RETURN(inet_csk_complete_hashdance, set_in_hashdance(false))
ON_ENTRY(inet_csk_reqsk_queue_add, connection_is_added(fentry, ARGUMENT(1), ARGUMENT(3)))
ON_RETURN(inet_csk_accept, connection_is_accepted(fentry, GIVEN(1), RESULT(inet_csk_accept)))
