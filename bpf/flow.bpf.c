// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/* The programs of a sensor: what arrives (flow_xdp), what leaves (flow_egress), the walks over the
 * two tables (flow_expire, flow_front). How packets become records is in entry.h.
 */
#include "packet.h"
#include "walk.h"

#define NEXT (-1) /* TCX_NEXT, which older headers call TC_ACT_UNSPEC: whoever else is attached decides */

SEC("xdp.frags")
int flow_xdp(struct xdp_md *ctx)
{
	struct packet p = {.length = frame_length(xdp_length(ctx))};
	enum parse_verdict verdict = parse_xdp(ctx, &p);

	observe(&p, verdict);
	return settings.mirror ? XDP_DROP : XDP_PASS;
}

/* By a TCX link at BPF_TCX_EGRESS; libbpf 1.1 knows the type by no newer name. */
SEC("tc")
int flow_egress(struct __sk_buff *skb)
{
	struct packet p = {.length = frame_length(skb->len)};
	enum parse_verdict verdict = parse_skb(skb, &p);

	observe(&p, verdict);
	return NEXT;
}

/* The floor to compare with. */
SEC("xdp.frags")
int pass_xdp(struct xdp_md *ctx)
{
	return XDP_PASS;
}

SEC("syscall")
int flow_expire(struct flow_walk *w)
{
	return walk_table(MAP_AT(flows), visit_flow, w);
}

SEC("syscall")
int flow_front(struct flow_walk *w)
{
	return settings.front_entries ? walk_table(MAP_AT(front), visit_place, w) : 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
