/* SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause */
/* The layout that the kernel program and user space share: keys, records, counters, settings.
 *
 * Everything here is in host byte order except addresses, which are 16 bytes as on the wire (IPv4 as ::ffff:a.b.c.d).
 * Every struct is fixed-width with its padding spelled out; tests compare the offsets seen by clang with those of
 * collector/records.py.
 */
#ifndef FLOWSAGE_FLOW_H
#define FLOWSAGE_FLOW_H

#define FLOW_LAYOUT_VERSION 2 /* of the table, the ring and the counters */

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

/* Rows of the per-CPU counter array, and their names in collector/loader.py (a test compares). At any quiet moment
 *   SEEN = ACCOUNTED + NON_IP + MALFORMED + TRUNCATED + DUPLICATE + LOST_*   and   ACCOUNTED = EMITTED + what the table holds.
 */
enum flow_counter {
	FLOW_SEEN_PACKETS,
	FLOW_SEEN_BYTES,
	FLOW_ACCOUNTED_PACKETS, /* in the table or in a record */
	FLOW_ACCOUNTED_BYTES,
	FLOW_NON_IP_PACKETS,
	FLOW_NON_IP_BYTES,
	FLOW_MALFORMED_PACKETS,
	FLOW_MALFORMED_BYTES,
	FLOW_TRUNCATED_PACKETS,
	FLOW_TRUNCATED_BYTES,
	FLOW_LOST_TABLE_PACKETS, /* neither a place in the table nor one in the ring */
	FLOW_LOST_TABLE_BYTES,
	FLOW_LOST_CLOSED_PACKETS, /* the flow was being closed by another CPU, and the ring was full */
	FLOW_LOST_CLOSED_BYTES,
	FLOW_EMITTED_RECORDS, /* which numbers them */
	FLOW_EMITTED_PACKETS,
	FLOW_EMITTED_BYTES,
	FLOW_FRAGMENT_NONFIRST, /* packets, accounted all the same */
	FLOW_CREATED, /* entries made in the table */
	FLOW_TABLE_FULL, /* packets that became a record of their own: no place in the table */
	FLOW_CLOSED_RACE, /* packets that became a record of their own: their flow was being closed */
	FLOW_RETRIES, /* look-ups repeated because an entry closed, or changed hands, underneath */
	FLOW_MISATTRIBUTED, /* packets left in another flow's record: its entry was reused and closed underneath */
	FLOW_RING_FULL, /* reservations that failed: the flow stays in the table, or see LOST_* */
	FLOW_PACKETS_TCP, /* of what was seen; neither TCP nor UDP nor ICMP (ICMPv6 with it): the rest of SEEN */
	FLOW_BYTES_TCP,
	FLOW_PACKETS_UDP,
	FLOW_BYTES_UDP,
	FLOW_PACKETS_ICMP,
	FLOW_BYTES_ICMP,
	FLOW_DUPLICATE_PACKETS, /* under settings.dedupe: seen on one interface, counted on another */
	FLOW_DUPLICATE_BYTES,
	FLOW_COUNTERS,
};

struct flow_counters {
	__u64 value[FLOW_COUNTERS];
};

/* Set before load, read-only for the program (so that the verifier removes what is switched off). A timeout of 0 never
 * fires.
 */
struct flow_settings {
	__u64 idle_ns;
	__u64 active_ns;
	__u64 half_open_ns; /* idle timeout of a TCP flow that has shown nothing but SYN */
	__u64 linger_ns; /* how long an ended flow waits for stragglers */
	__u64 soonest_ns; /* the least of these timeouts that is not 0: a shorter silence ends nothing */
	__u32 wake_bytes; /* wake the reader when this much waits in the ring */
	__u32 front_entries; /* places in the front (entry.h): a power of two; 0: there is none */
	__u8 mirror; /* drop after accounting: the interface carries copies */
	__u8 external_clock; /* time, and where it says so length, are those in struct flow_input */
	__u8 tcp_ends; /* FIN, RST and a new SYN end a flow */
	__u8 layout; /* FLOW_LAYOUT_VERSION: of the object, never set */
	__u8 dedupe; /* a packet that several interfaces see is counted on one of them */
	__u8 pad[3];
};

/* Written by user space before each packet of a capture. BPF_PROG_TEST_RUN carries frames of 14 to some 73,000 bytes only:
 * a longer one is run by its beginning (all headers fit), a shorter one filled up, with its own length said here.
 */
struct flow_input {
	__u64 clock_ns;
	__u64 length; /* of the frame where FLOW_INPUT_LENGTH is set, otherwise the frame is as long as it is */
};

#define FLOW_INPUT_LENGTH (1ULL << 63)

enum flow_walk_mode {
	FLOW_WALK_EXPIRE, /* emit what has ended or timed out */
	FLOW_WALK_FLUSH, /* emit everything */
	FLOW_WALK_COUNT, /* emit nothing, add up what is there */
};

/* Context of the syscall program flow_expire; zeros in, sums out. */
struct flow_walk {
	__u64 now_ns; /* 0: the program's own clock */
	__u32 mode;
	__u32 pad;
	__u64 emitted; /* records */
	__u64 removed; /* entries deleted */
	__u64 failed; /* entries that should have been emitted: ring full, or busy on another CPU */
	__u64 flows; /* entries seen that stay */
	__u64 packets; /* in those */
	__u64 bytes;
};

_Static_assert(sizeof(struct flow_key) == 40, "flow_key");
_Static_assert(sizeof(struct flow_settings) == 56, "flow_settings");
_Static_assert(sizeof(struct flow_walk) == 64, "flow_walk");
_Static_assert(sizeof(struct flow_direction) == 64, "flow_direction");
_Static_assert(sizeof(struct flow_record) == 248, "flow_record");

#endif
