/* SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause */
/* The layout that the kernel program and user space share: keys, records, counters, settings.
 *
 * Everything here is in host byte order except addresses, which are 16 bytes as on the wire (IPv4 as ::ffff:a.b.c.d).
 * Every struct is fixed-width with its padding spelled out; tests compare the offsets seen by clang with those of
 * collector/records.py.
 */
#ifndef FLOWSAGE_FLOW_H
#define FLOWSAGE_FLOW_H

#define FLOW_LAYOUT_VERSION 1

/* IPFIX flowEndReason (IANA, information element 136). */
enum flow_end_reason {
	FLOW_END_IDLE_TIMEOUT = 1,
	FLOW_END_ACTIVE_TIMEOUT = 2,
	FLOW_END_DETECTED = 3, /* FIN both ways, or RST */
	FLOW_END_FORCED = 4, /* flush at shutdown */
	FLOW_END_LACK_OF_RESOURCES = 5, /* table full: the packet is a record of its own */
};

enum flow_flags {
	FLOW_VLAN_CHANGED = 1 << 0, /* later packets carried another VLAN than the first */
	FLOW_CONTINUED = 1 << 1, /* an earlier record of the same flow has been emitted */
};

/* Canonical: (addr[0], port[0]) <= (addr[1], port[1]). 40 bytes. */
struct flow_key {
	__u8 addr[2][16];
	__u16 port[2]; /* 0 where the protocol has none */
	__u8 proto; /* IANA protocol number */
	__u8 ip_version; /* 4 or 6 */
	__u16 pad;
};

/* What one direction of a flow did. 64 bytes: a cache line. */
struct flow_direction {
	__u64 packets;
	__u64 bytes; /* frame lengths, Ethernet header included */
	__u64 length_sumsq; /* sum of squared frame lengths, bytes^2 */
	__u64 iat_sum_ns; /* sum of inter-arrival times */
	__u64 iat_sumsq_us2; /* sum of squared inter-arrival times, each at most 2^26 us */
	__u64 last_ns; /* time of the direction's last packet, 0: none */
	__u32 length_min;
	__u32 length_max;
	__u8 tcp_flags; /* OR of TCP byte 13, CWR..FIN */
	__u8 ttl_min; /* TTL or hop limit */
	__u8 ttl_max;
	__u8 pad;
	__u32 fragments; /* non-first fragments among the packets */
};

/* One slot of the ring: 8 bytes of ring header + 248 = 256. direction[0]: initiator to responder. */
struct flow_record {
	__u8 initiator[16];
	__u8 responder[16];
	__u16 initiator_port;
	__u16 responder_port;
	__u8 proto;
	__u8 ip_version;
	__u8 end_reason;
	__u8 flags;
	__u64 start_ns; /* first packet, the program's clock (CLOCK_MONOTONIC, or the capture's own) */
	__u64 end_ns; /* last packet */
	__u64 handshake_ns; /* first SYN to first SYN-ACK, 0: not both seen */
	__u32 ifindex; /* where the first packet arrived */
	__u16 vlan; /* outer VLAN id of the first packet, 0: none */
	__u8 icmp_type; /* of the first packet; valid where icmp_valid */
	__u8 icmp_code;
	__u8 icmp_valid;
	__u8 pad[7];
	struct flow_direction direction[2];
	__u64 sequence; /* per CPU: cpu << 48 | n, so that no record can be counted twice unseen */
	__u8 reserved[32]; /* zero: makes the slot a power of two */
};

_Static_assert(sizeof(struct flow_key) == 40, "flow_key");
_Static_assert(sizeof(struct flow_direction) == 64, "flow_direction");
_Static_assert(sizeof(struct flow_record) == 248, "flow_record");

#endif
