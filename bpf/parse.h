/* SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause */
/* From a frame to (flow key, direction, what the packet adds), by the accounting rules S1-S12.
 *
 * Contract of every parse_*: the cursor's `off` is where its header begins; on PARSE_OK it is where the next one does.
 * Before bytes [off, off + n) are read: beyond the frame is PARSE_TRUNCATED, otherwise beyond the IP packet (by its own
 * length field) is PARSE_MALFORMED, in this order. Ethernet padding is therefore never read as a header. Wire fields are
 * big-endian in the packet and in addresses; every other number in struct packet is in host order.
 */
#ifndef FLOWSAGE_PARSE_H
#define FLOWSAGE_PARSE_H

#include "compat.h"
#include "flow.h"

#define VLAN_TAGS_MAX 2
#define EXTENSIONS_MAX 6
#define NO_L3_END 0xffffffffu
#define IP_FRAGMENT_OFFSET 0x1fff
#define IP6_FRAGMENT_OFFSET 0xfff8
#define VLAN_ID_MASK 0x0fff
#define VLAN_HLEN 4
#define EGRESS (1u << 31)

enum parse_verdict {
	PARSE_OK,
	PARSE_NON_IP,
	PARSE_MALFORMED,
	PARSE_TRUNCATED,
};

struct packet {
	struct flow_key key;
	__u64 source[2]; /* addresses as in the key, before the pair is ordered */
	__u64 destination[2];
	__u64 print; /* of the key: the table's own, and what tells apart two flows that follow each other in one element */
	__u32 length; /* of the frame */
	__u32 place; /* interface, and EGRESS where it leaves */
	__u16 source_port;
	__u16 destination_port;
	__u16 vlan;
	__u8 side; /* which end of the key sent it */
	__u8 tcp_flags;
	__u8 ttl;
	__u8 fragment; /* not the first */
	__u8 icmp_valid;
	__u8 icmp_type;
	__u8 icmp_code;
};

struct cursor {
	void *ctx; /* struct xdp_md or __sk_buff */
	void *data;
	void *data_end;
	__u64 off;
	__u32 length; /* of the frame, fragments included */
	__u32 l3_end;
	__u8 skb; /* what ctx is */
	__u8 tags; /* VLAN tags that the kernel has taken out of the frame */
};

struct vlan_header {
	__be16 tci;
	__be16 next;
};

static __always_inline enum parse_verdict need(const struct cursor *c, __u32 size)
{
	if (c->off + size > c->length)
		return PARSE_TRUNCATED;
	if (c->off + size > c->l3_end)
		return PARSE_MALFORMED;
	return PARSE_OK;
}

/* `size` bytes at the cursor, which need() has allowed: in place, or copied where they are not in the linear part (a
 * jumbo frame's header chain can reach into its fragments). The frame is never changed for it: pulling an skb would be
 * work for everybody after us. NULL never happens, but the verifier cannot know.
 */
static __always_inline const void *view(const struct cursor *c, __u32 size, void *scratch)
{
	void *at = c->data + c->off;

	if (at + size <= c->data_end)
		return at;
	if (c->skb)
		return bpf_skb_load_bytes(c->ctx, c->off, scratch, size) ? NULL : scratch;
	return bpf_xdp_load_bytes(c->ctx, c->off, scratch, size) ? NULL : scratch;
}

static __always_inline enum parse_verdict parse_vlan(struct cursor *c, struct packet *p, __be16 *type)
{
	struct vlan_header scratch;
	const struct vlan_header *tag;

	for (int depth = c->tags; depth < VLAN_TAGS_MAX; depth++) {
		if (*type != bpf_htons(ETH_P_8021Q) && *type != bpf_htons(ETH_P_8021AD))
			break;
		if (need(c, sizeof(*tag)) || !(tag = view(c, sizeof(*tag), &scratch)))
			return PARSE_TRUNCATED;
		if (depth == 0)
			p->vlan = bpf_ntohs(tag->tci) & VLAN_ID_MASK;
		*type = tag->next;
		c->off += sizeof(*tag);
	}
	return PARSE_OK;
}

static __always_inline enum parse_verdict parse_ports(struct cursor *c, struct packet *p, __u32 minimum)
{
	enum parse_verdict verdict = need(c, minimum);
	const __be16 *port;
	__be16 scratch[2];

	if (verdict)
		return verdict;
	port = view(c, sizeof(scratch), scratch);
	if (!port)
		return PARSE_TRUNCATED;
	p->source_port = bpf_ntohs(port[0]);
	p->destination_port = bpf_ntohs(port[1]);
	return PARSE_OK;
}

static __always_inline enum parse_verdict parse_tcp(struct cursor *c, struct packet *p)
{
	enum parse_verdict verdict = need(c, 20);
	__u32 scratch[4];
	const __u8 *tcp;

	if (verdict)
		return verdict;
	tcp = view(c, sizeof(scratch), scratch);
	if (!tcp)
		return PARSE_TRUNCATED;
	p->source_port = bpf_ntohs(((const __be16 *)tcp)[0]);
	p->destination_port = bpf_ntohs(((const __be16 *)tcp)[1]);
	p->tcp_flags = tcp[13];
	return PARSE_OK;
}

static __always_inline enum parse_verdict parse_icmp(struct cursor *c, struct packet *p)
{
	enum parse_verdict verdict = need(c, 8);
	const __u8 *icmp;
	__u16 scratch;

	if (verdict)
		return verdict;
	icmp = view(c, sizeof(scratch), &scratch);
	if (!icmp)
		return PARSE_TRUNCATED;
	p->icmp_type = icmp[0];
	p->icmp_code = icmp[1];
	p->icmp_valid = 1;
	return PARSE_OK;
}

static __always_inline enum parse_verdict parse_l4(struct cursor *c, struct packet *p)
{
	switch (p->key.proto) {
	case IPPROTO_TCP:
		return parse_tcp(c, p);
	case IPPROTO_UDP:
	case IPPROTO_UDPLITE:
		return parse_ports(c, p, 8);
	case IPPROTO_SCTP:
	case IPPROTO_DCCP:
		return parse_ports(c, p, 12);
	case IPPROTO_ICMP:
		return p->key.ip_version == 4 ? parse_icmp(c, p) : PARSE_OK;
	case IPPROTO_ICMPV6:
		return p->key.ip_version == 6 ? parse_icmp(c, p) : PARSE_OK;
	default:
		return PARSE_OK;
	}
}

static __always_inline enum parse_verdict parse_ipv4(struct cursor *c, struct packet *p)
{
	const struct iphdr *ip;
	struct iphdr scratch;
	__u32 header, total;

	if (need(c, sizeof(*ip)) || !(ip = view(c, sizeof(*ip), &scratch)))
		return PARSE_TRUNCATED;
	header = (*(const __u8 *)ip & 15) * 4;
	if (*(const __u8 *)ip >> 4 != 4 || header < sizeof(*ip))
		return PARSE_MALFORMED;
	if (need(c, header))
		return PARSE_TRUNCATED;
	total = bpf_ntohs(ip->tot_len);
	if (total < header)
		return PARSE_MALFORMED;
	c->l3_end = c->off + total;
	c->off += header;
	p->key.ip_version = 4;
	p->key.proto = ip->protocol;
	p->ttl = ip->ttl;
	p->source[1] = (__u64)ip->saddr << 32 | bpf_htonl(0xffff); /* ::ffff:a.b.c.d */
	p->destination[1] = (__u64)ip->daddr << 32 | bpf_htonl(0xffff);
	if (ip->frag_off & bpf_htons(IP_FRAGMENT_OFFSET)) {
		p->fragment = 1;
		return PARSE_OK;
	}
	return parse_l4(c, p);
}

/* Skips extension headers. AH counts its length in 4-byte units less two, the others in 8-byte units less one. */
static __always_inline enum parse_verdict parse_extensions(struct cursor *c, struct packet *p)
{
	enum parse_verdict verdict;
	const __u8 *extension;
	__u64 scratch;
	__u8 next;

	for (int depth = 0; depth <= EXTENSIONS_MAX; depth++) {
		__u8 type = p->key.proto;

		if (type != IPPROTO_HOPOPTS && type != IPPROTO_ROUTING && type != IPPROTO_DSTOPTS &&
		    type != IPPROTO_FRAGMENT && type != IPPROTO_AH)
			return PARSE_OK;
		if (depth == EXTENSIONS_MAX)
			break;
		verdict = need(c, sizeof(scratch));
		if (verdict)
			return verdict;
		extension = view(c, sizeof(scratch), &scratch);
		if (!extension)
			return PARSE_TRUNCATED;
		next = extension[0];
		if (type == IPPROTO_FRAGMENT) {
			c->off += 8;
			if (*(const __be16 *)(extension + 2) & bpf_htons(IP6_FRAGMENT_OFFSET)) {
				p->key.proto = next;
				p->fragment = 1;
				return PARSE_OK;
			}
		} else {
			__u32 size = type == IPPROTO_AH ? (extension[1] + 2) * 4 : (extension[1] + 1) * 8;

			verdict = need(c, size);
			if (verdict)
				return verdict;
			c->off += size;
		}
		p->key.proto = next;
	}
	return PARSE_MALFORMED;
}

static __always_inline enum parse_verdict parse_ipv6(struct cursor *c, struct packet *p)
{
	enum parse_verdict verdict;
	const struct ipv6hdr *ip;
	struct ipv6hdr scratch;

	if (need(c, sizeof(*ip)) || !(ip = view(c, sizeof(*ip), &scratch)))
		return PARSE_TRUNCATED;
	if (*(const __u8 *)ip >> 4 != 6)
		return PARSE_MALFORMED;
	c->off += sizeof(*ip);
	c->l3_end = c->off + bpf_ntohs(ip->payload_len);
	p->key.ip_version = 6;
	p->key.proto = ip->nexthdr;
	p->ttl = ip->hop_limit;
	for (int half = 0; half < 2; half++) {
		p->source[half] = ((const __u64 *)&ip->saddr)[half];
		p->destination[half] = ((const __u64 *)&ip->daddr)[half];
	}
	verdict = parse_extensions(c, p);
	if (verdict || p->fragment)
		return verdict;
	return parse_l4(c, p);
}

/* 64 bits of the key's five words, which the table hashes instead of them all: its own function takes 20 ns more for 40
 * bytes than for 8. Products keep the upper bits apart, the shift brings them down; two flows of 262,144 have the same print
 * once in 10^9 tables, and then one goes without an entry (see account).
 */
static __always_inline __u64 print_of(const struct flow_key *key)
{
	const __u64 *word = (const __u64 *)key;
	const __u64 by[5] = {0x9e3779b97f4a7c15, 0xbf58476d1ce4e5b9, 0x94d049bb133111eb, 0xd6e8feb86659fd93,
			     0xa0761d6478bd642f};
	__u64 print = 0;

	for (int i = 0; i < 5; i++) {
		__u64 product = word[i] * by[i];

		print += (product ^ product >> 32) * by[4 - i];
	}
	return print ^ print >> 29;
}

static __always_inline int same_key(const struct flow_key *a, const struct flow_key *b)
{
	const __u64 *x = (const __u64 *)a, *y = (const __u64 *)b;

	return !((x[0] ^ y[0]) | (x[1] ^ y[1]) | (x[2] ^ y[2]) | (x[3] ^ y[3]) | (x[4] ^ y[4]));
}

/* Orders the two ends, so that both directions have one key. */
static __always_inline void order_ends(struct packet *p)
{
	__u64 sh = bpf_be64_to_cpu(p->source[0]), dh = bpf_be64_to_cpu(p->destination[0]);
	__u64 sl = bpf_be64_to_cpu(p->source[1]), dl = bpf_be64_to_cpu(p->destination[1]);
	__u64 *a = (__u64 *)p->key.addr[0], *b = (__u64 *)p->key.addr[1];

	p->side = sh != dh ? sh > dh : sl != dl ? sl > dl : p->source_port > p->destination_port;
	if (p->side) {
		a[0] = p->destination[0], a[1] = p->destination[1], p->key.port[0] = p->destination_port;
		b[0] = p->source[0], b[1] = p->source[1], p->key.port[1] = p->source_port;
	} else {
		a[0] = p->source[0], a[1] = p->source[1], p->key.port[0] = p->source_port;
		b[0] = p->destination[0], b[1] = p->destination[1], p->key.port[1] = p->destination_port;
	}
	p->print = print_of(&p->key);
}

/* The whole frame at the cursor's beginning. `p` is zero but for what the frame itself does not say. */
static __always_inline enum parse_verdict parse_frame(struct cursor *c, struct packet *p)
{
	enum parse_verdict verdict;
	const struct ethhdr *eth;
	struct ethhdr scratch;
	__be16 type;

	if (need(c, sizeof(*eth)) || !(eth = view(c, sizeof(*eth), &scratch)))
		return PARSE_TRUNCATED;
	type = eth->h_proto;
	c->off += sizeof(*eth);
	verdict = parse_vlan(c, p, &type);
	if (verdict)
		return verdict;
	if (type == bpf_htons(ETH_P_IP))
		verdict = parse_ipv4(c, p);
	else if (type == bpf_htons(ETH_P_IPV6))
		verdict = parse_ipv6(c, p);
	else
		return PARSE_NON_IP;
	if (!verdict)
		order_ends(p);
	return verdict;
}

/* A frame that arrives. */
static __always_inline enum parse_verdict parse_xdp(struct xdp_md *ctx, struct packet *p)
{
	struct cursor c = {
		.ctx = ctx,
		.data = (void *)(long)ctx->data,
		.data_end = (void *)(long)ctx->data_end,
		.length = p->length,
		.l3_end = NO_L3_END,
	};

	p->place = ctx->ingress_ifindex;
	return parse_frame(&c, p);
}

/* A frame that leaves: as the wire will have it, but for segmentation, which is the card's: a super-frame of TCP is one
 * packet here, with its one header. The outer tag may be beside the frame; its 4 bytes are not in p->length yet.
 */
static __always_inline enum parse_verdict parse_skb(struct __sk_buff *skb, struct packet *p)
{
	struct cursor c = {
		.ctx = skb,
		.data = (void *)(long)skb->data,
		.data_end = (void *)(long)skb->data_end,
		.length = p->length,
		.l3_end = NO_L3_END,
		.skb = 1,
	};

	p->place = skb->ifindex | EGRESS;
	if (skb->vlan_present) {
		c.tags = 1;
		p->vlan = skb->vlan_tci & VLAN_ID_MASK;
		p->length += VLAN_HLEN;
	}
	return parse_frame(&c, p);
}

#endif
