"""Host embeddings of closed windows, as Arrow: a record a window, for who explores or clusters hosts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from flowsage.collector.sink import CONTENT_TYPE, Headers
from flowsage.models.detector import ClosedWindows
from flowsage.models.meeting import MeetingPrior

SCHEMA_VERSION = 1


def embeddings_of(closed: ClosedWindows, prior: MeetingPrior, window_ns: int) -> Iterator[pa.RecordBatch]:
    """A batch a window of the run: window_start_ns, host, embedding f32[d], of every host that was in it.

    Embeddings are as of the end of the run, from what is remembered of a host. None before the graph has learnt.
    """
    if not prior.speaks:
        return
    contacts, hosts = closed.contacts, closed.flows.hosts
    for k, window in enumerate(contacts.windows.tolist()):
        part = slice(int(contacts.offsets[k]), int(contacts.offsets[k + 1]))
        index = np.unique(np.concatenate([contacts.src[part], contacts.dst[part]]))
        vectors = prior.embeddings(hosts.hash[index])
        width = vectors.shape[1]
        values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), width)
        names = hosts.names.take(pa.array(index)).cast(pa.string())
        start = pa.array(np.full(len(index), window * window_ns), pa.int64())
        yield pa.RecordBatch.from_arrays([start, names, values], ["window_start_ns", "host", "embedding"])


def embedding_records(batches: Sequence[pa.RecordBatch], site: int) -> Iterator[tuple[bytes | None, bytes, Headers]]:
    """Key (none), value (an Arrow IPC stream, zstd) and headers of the record of each window of a site, a partition of
    the flows' topic."""
    for batch in batches:
        out = pa.BufferOutputStream()
        with pa.ipc.new_stream(out, batch.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
            writer.write_batch(batch)
        start = batch.column(0)[0].as_py()
        yield (
            None,
            out.getvalue().to_pybytes(),
            [
                ("ce_specversion", b"1.0"),
                ("ce_id", b"%d-%d" % (site, start)),
                ("ce_type", b"flowsage.embeddings.v1"),
                ("ce_source", b"/flowsage/scorer"),
                ("ce_dataschema", b"urn:flowsage:embeddings:%d" % SCHEMA_VERSION),
                ("content-type", CONTENT_TYPE.encode()),
            ],
        )
