"""The ledger closes to the packet under load, with room for everything and with room for next to nothing."""

import time

import pyarrow as pa

from flowsage.collector.agent import Agent
from flowsage.collector.agent_settings import AgentSettings
from flowsage.collector.records import packets_in
from flowsage.collector.sink import Origin, Sink
from tests.collector.wires import start_blast, wire

MS = 1_000_000


class Count(Sink):
    """A sink that counts."""

    packets = records = 0

    def put(self, batch: pa.RecordBatch, origin: Origin) -> None:
        self.packets += packets_in(batch)
        self.records += len(batch)


def watch_blast(*, flows: int, packets: int, rate: int, **settings: int):
    """Final ledger and sink of a sensor that saw a blast, and how much was sent; asked for its ledger all the while."""
    with wire() as cable:
        sink = Count()
        agent = Agent(AgentSettings(name="load", interfaces=(cable.port,), netns=cable.near, **settings), sink)
        agent.start()
        blast = start_blast(cable, flows=flows, packets=packets, rate=rate)
        while blast.poll() is None:
            assert agent.snapshot(walk=False).closes
            time.sleep(0.05)
        assert blast.stdout
        sent = int(blast.stdout.read())
        blast.stdout.close()
        agent.stop()
        return agent.join(), sink, sent


def test_a_million_packets_at_100_000_a_second_are_all_accounted_for():
    final, sink, sent = watch_blast(flows=100_000, packets=1_000_000, rate=100_000, idle_timeout=2000 * MS)
    assert final.closes
    assert final.seen.packets == sent == sink.packets
    assert sum(count.packets for count in final.lost.values()) == 0
    assert final.events["ring_full"] == 0


def test_a_ring_of_4_kib_and_a_table_of_64_lose_packets_and_can_say_every_one():
    final, sink, sent = watch_blast(flows=20_000, packets=200_000, rate=50_000, ring_bytes=4096, table_entries=64)
    assert final.closes
    assert final.seen.packets == sent
    lost = final.lost["lost_table"].packets + final.lost["lost_closed"].packets
    assert lost > 0
    assert sink.packets + lost == sent
    assert final.events["ring_full"] > 0


def test_a_table_of_64_under_10_000_flows_loses_nothing_while_the_ring_has_room():
    final, sink, sent = watch_blast(flows=10_000, packets=100_000, rate=50_000, table_entries=64)
    assert final.closes
    assert sink.packets == sent == final.seen.packets
    assert final.events["table_full"] > 0
