// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/* Packets and bytes by protocol, and nothing else: what to load where a flow table is not wanted. */
#include "parse.h"

enum counter_protocol {
	COUNTER_TCP,
	COUNTER_UDP,
	COUNTER_ICMP,
	COUNTER_OTHER, /* everything else, what is not IP included */
	COUNTER_PROTOCOLS,
};

struct counter {
	__u64 packets;
	__u64 bytes;
};

MAP(protocols, PERCPU_ARRAY, __u32, struct counter, COUNTER_PROTOCOLS, 0);

static __always_inline __u32 protocol_of(const struct packet *p)
{
	switch (p->key.proto) {
	case IPPROTO_TCP:
		return COUNTER_TCP;
	case IPPROTO_UDP:
		return COUNTER_UDP;
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		return COUNTER_ICMP;
	default:
		return COUNTER_OTHER;
	}
}

SEC("xdp.frags")
int xdp_counter(struct xdp_md *ctx)
{
	struct packet p = {.length = xdp_length(ctx)};
	__u32 row = parse_xdp(ctx, &p) == PARSE_OK ? protocol_of(&p) : COUNTER_OTHER;
	struct counter *c = bpf_map_lookup_elem(MAP_AT(protocols), &row);

	if (c) {
		c->packets++;
		c->bytes += p.length;
	}
	return XDP_PASS;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
