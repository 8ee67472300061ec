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

/* The function that is running on this CPU, and what the counters were when it was entered. */
struct decision {
	u64 sk;
	u64 skb;
	u64 counters; /* address of this CPU's share */
	u64 overflows;
	u64 drops;
	u64 full_cookies;
	u64 syn_queue_drops;
	u64 cookies;
	u64 resets;
	struct event event;
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

static __always_inline struct watched_listener *watched(u64 sk)
{
	u64 cookie = READ(u64, sk + SOCK_COMMON_SKC_COOKIE);

	return listeners.lookup(&cookie);
}

static __always_inline void describe_queue(struct event *event, u64 sk, u16 peer_port)
{
	u64 length = READ(u32, sk + SOCK_SK_ACK_BACKLOG);
	u64 limit = READ(u32, sk + SOCK_SK_MAX_ACK_BACKLOG);

	event->value[0] = (length & 0xffffff) | (limit & 0xffffff) << 24 | (u64)peer_port << 48;
	event->stack = READ(s32, sk + INET_CONNECTION_SOCK_ICSK_ACCEPT_QUEUE_QLEN);
}

/* An IPv6 address as two numbers, so that the first eight bytes are the high one. */
static __always_inline void describe_ipv6(struct event *event, u64 address)
{
	event->value[1] = __builtin_bswap64(READ(u64, address));
	event->value[2] = __builtin_bswap64(READ(u64, address + 8));
}

static __always_inline bool is_ipv4(u64 skb)
{
	return READ(u16, skb + SK_BUFF_PROTOCOL) == __builtin_bswap16(ETH_P_IP);
}

/* The listener's side of a packet: its queue, and who sent it. */
static __always_inline void describe_packet(struct event *event, u64 sk, u64 skb)
{
	u64 head = READ(u64, skb + SK_BUFF_HEAD);
	u64 network = head + READ(u16, skb + SK_BUFF_NETWORK_HEADER);
	u64 transport = head + READ(u16, skb + SK_BUFF_TRANSPORT_HEADER);

	describe_queue(event, sk, __builtin_bswap16(READ(u16, transport + TCPHDR_SOURCE)));
	if (is_ipv4(skb))
		event->value[2] = IPV4_MAPPED | __builtin_bswap32(READ(u32, network + IPHDR_SADDR));
	else
		describe_ipv6(event, network + IPV6HDR_SADDR);
}

/* The listener's side of a finished connection. */
static __always_inline void describe_connection(struct event *event, u64 listener, u64 child)
{
	describe_queue(event, listener, __builtin_bswap16(READ(u16, child + SOCK_COMMON_SKC_DPORT)));
	if (READ(u16, child + SOCK_COMMON_SKC_FAMILY) == AF_INET)
		event->value[2] = IPV4_MAPPED | __builtin_bswap32(READ(u32, child + SOCK_COMMON_SKC_DADDR));
	else
		describe_ipv6(event, child + SOCK_COMMON_SKC_V6_DADDR);
}

/* A token bucket for each kind of event: a flood is counted to the last packet, and sent in part. */
static __always_inline void send_bounded(struct event *event, u32 kind)
{
	struct probe_counters *counter = counters_of(PROBE_LISTENER + kind);
	struct bucket *bucket = buckets.lookup(&kind);
	u64 now_ns = bpf_ktime_get_ns();

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

static __always_inline u64 counted(struct decision *decision, u32 counter)
{
	return READ(u64, decision->counters + LINUX_MIB_MIBS + counter * sizeof(u64));
}

static __always_inline struct decision *request_arrives(u32 at, u64 sk, u64 skb)
{
	struct decision *decision = decisions.lookup(&at);
	struct watched_listener *listener = watched(sk);

	if (!decision)
		return 0;
	decision->sk = sk;
	decision->skb = skb;
	decision->counters = READ(u64, READ(u64, sk + SOCK_COMMON_SKC_NET) + NET_MIB_NET_STATISTICS) +
			     READ(u64, PER_CPU_OFFSETS + bpf_get_smp_processor_id() * sizeof(u64));
	decision->overflows = counted(decision, LINUX_MIB_LISTENOVERFLOWS);
	decision->drops = counted(decision, LINUX_MIB_LISTENDROPS);
	decision->full_cookies = counted(decision, LINUX_MIB_TCPREQQFULLDOCOOKIES);
	decision->watched = listener;
	decision->active = true;
	if (!listener)
		return 0;
	__builtin_memset(&decision->event, 0, sizeof(decision->event));
	decision->event.start_ns = bpf_ktime_get_ns();
	decision->event.pid = listener->pid;
	decision->event.tid = listener->index;
	return decision;
}

/* Add what this function added to the namespace's counters to our own, so that both can be compared. */
static __always_inline void count_requests(struct decision *decision)
{
	struct counted_requests gained = {
		.overflows = counted(decision, LINUX_MIB_LISTENOVERFLOWS) - decision->overflows,
		.drops = counted(decision, LINUX_MIB_LISTENDROPS) - decision->drops,
		.full_cookies = counted(decision, LINUX_MIB_TCPREQQFULLDOCOOKIES) - decision->full_cookies,
	};
	struct requests_of whose = {.watched = decision->watched};
	struct counted_requests *total, none = {};

	if (!gained.overflows && !gained.drops && !gained.full_cookies)
		return;
	whose.namespace = READ(u32, READ(u64, decision->sk + SOCK_COMMON_SKC_NET) + NET_NS_INUM);
	total = counted_requests.lookup_or_try_init(&whose, &none);
	if (!total)
		return;
	__sync_fetch_and_add(&total->overflows, gained.overflows);
	__sync_fetch_and_add(&total->drops, gained.drops);
	__sync_fetch_and_add(&total->full_cookies, gained.full_cookies);
}

/* Return the decision that ends here when its listener is watched, else NULL. */
static __always_inline struct decision *decided(u32 at)
{
	struct decision *decision = decisions.lookup(&at);

	if (!decision || !decision->active)
		return 0;
	decision->active = false;
	count_requests(decision);
	return decision->watched ? decision : 0;
}

static __always_inline int syn_arrives(u64 sk, u64 skb)
{
	struct decision *decision = request_arrives(AT_SYN, sk, skb);

	if (!decision)
		return 0;
	decision->syn_queue_drops = counted(decision, LINUX_MIB_TCPREQQFULLDROP);
	decision->cookies = counted(decision, LINUX_MIB_SYNCOOKIESSENT);
	describe_packet(&decision->event, sk, skb);
	return 0;
}

static __always_inline int syn_is_decided(void)
{
	struct decision *decision = decided(AT_SYN);
	u32 kind = SYN_TAKEN;

	if (!decision)
		return 0;
	if (counted(decision, LINUX_MIB_LISTENOVERFLOWS) != decision->overflows)
		kind = SYN_REFUSED_ACCEPT_QUEUE_FULL;
	else if (counted(decision, LINUX_MIB_TCPREQQFULLDROP) != decision->syn_queue_drops)
		kind = SYN_REFUSED_SYN_QUEUE_FULL;
	else if (counted(decision, LINUX_MIB_LISTENDROPS) != decision->drops)
		kind = SYN_REFUSED_OTHERWISE;
	else if (counted(decision, LINUX_MIB_SYNCOOKIESSENT) != decision->cookies)
		kind = SYN_COOKIE_SENT;
	send_bounded(&decision->event, kind);
	return 0;
}

static __always_inline int ack_arrives(u64 sk, u64 skb)
{
	struct decision *decision = request_arrives(AT_ACK, sk, skb);

	if (decision)
		decision->resets = counted(decision, LINUX_MIB_EMBRYONICRSTS);
	return 0;
}

/* tcp_check_req answers a refusal with RST or not at all, by sysctl; cookie_v4/v6_check never answer */
static __always_inline int ack_is_decided(bool cookie)
{
	struct decision *decision = decided(AT_ACK);
	u32 kind = ACK_REFUSED_OTHERWISE;

	if (!decision || counted(decision, LINUX_MIB_LISTENDROPS) == decision->drops)
		return 0;
	if (counted(decision, LINUX_MIB_LISTENOVERFLOWS) != decision->overflows) {
		if (cookie)
			kind = COOKIE_ACK_REFUSED;
		else if (counted(decision, LINUX_MIB_EMBRYONICRSTS) != decision->resets)
			kind = ACK_REFUSED_WITH_RST;
		else
			kind = ACK_REFUSED_SILENTLY;
	}
	describe_packet(&decision->event, decision->sk, decision->skb);
	send_bounded(&decision->event, kind);
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

static __always_inline int connection_waits(u64 sk, u64 child)
{
	struct watched_listener *listener = watched(sk);

	if (!listener)
		return 0;
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

	describe_connection(&event, sk, child);
	event.value[0]++; /* its length with this connection */
	waiting_connections.update(&child, &waiting);
	send_bounded(&event, CONNECTION_ENQUEUED);
	return 0;
}

/*
 * inet_csk_complete_hashdance puts an ordinary connection into the queue, by inet_csk_reqsk_queue_add, which
 * the compiler may have made a part of it; a cookie's connection goes there directly.
 */
static __always_inline int hashdance_begins(u64 sk, u64 child, bool own_request)
{
	set_in_hashdance(true);
	return own_request ? connection_waits(sk, child) : 0;
}

static __always_inline int connection_is_added(u64 sk, u64 child)
{
	u32 zero = 0;
	bool *place = in_hashdance.lookup(&zero);

	return place && *place ? 0 : connection_waits(sk, child);
}

static __always_inline int connection_is_accepted(u64 child)
{
	struct waiting_connection *waiting = waiting_connections.lookup(&child);

	if (!waiting)
		return 0;
	struct event event = {
		.start_ns = waiting->enqueued_ns,
		.duration_ns = bpf_ktime_get_ns() - waiting->enqueued_ns,
		.pid = waiting->pid,
		.tid = waiting->index,
	};

	describe_connection(&event, waiting->listener, child);
	waiting_connections.delete(&child);
	send_bounded(&event, CONNECTION_ACCEPTED);
	return 0;
}

/*
 * Where each function is hooked, one line a program. The build chooses for each function f whether it is
 * kprobe and kretprobe (USES_FENTRY_f 0) or fentry and fexit (1), and passes the names ENTER_f and RETURN_f:
 * by a tracing program's name bcc finds the function to attach to. Behind the arguments, ARGUMENTS_f of them
 * by BTF, an fexit finds the result.
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
#define RESULT(function) (fentry ? ((u64 *)ctx)[ARGUMENTS_##function] : PT_REGS_RC(((struct pt_regs *)ctx)))

ON_ENTRY(tcp_conn_request, syn_arrives(ARGUMENT(3), ARGUMENT(4)))
ON_RETURN(tcp_conn_request, syn_is_decided())
ON_ENTRY(tcp_check_req, ack_arrives(ARGUMENT(1), ARGUMENT(2)))
ON_RETURN(tcp_check_req, ack_is_decided(false))
ON_ENTRY(cookie_v4_check, ack_arrives(ARGUMENT(1), ARGUMENT(2)))
ON_RETURN(cookie_v4_check, ack_is_decided(true))
ON_ENTRY(cookie_v6_check, ack_arrives(ARGUMENT(1), ARGUMENT(2)))
ON_RETURN(cookie_v6_check, ack_is_decided(true))
ON_ENTRY(inet_csk_complete_hashdance, hashdance_begins(ARGUMENT(1), ARGUMENT(2), (u8)ARGUMENT(4)))
ON_RETURN(inet_csk_complete_hashdance, set_in_hashdance(false))
ON_ENTRY(inet_csk_reqsk_queue_add, connection_is_added(ARGUMENT(1), ARGUMENT(3)))
ON_RETURN(inet_csk_accept, connection_is_accepted(RESULT(inet_csk_accept)))
