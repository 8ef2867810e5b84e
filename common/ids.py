"""Names of things that cross process borders. Opaque: no meaning is ever parsed out of an id."""

from typing import NewType

RequestId = NewType("RequestId", str)
"""One prompt of a client request: the `x-request-id` that the client sees, made unique."""

TransferId = NewType("TransferId", str)
"""One attempt to hand a request's KV from a prefill to a decode worker. A retry is a new transfer."""

WorkerId = NewType("WorkerId", str)
"""Name of a process in the cluster, such as `decode-0`. Survives a restart."""

Incarnation = NewType("Incarnation", int)
"""Random 64-bit number drawn at process start. A restarted worker is a new incarnation."""

PeerId = NewType("PeerId", str)
"""`peer_id(worker, incarnation)`: one life of one process; the ZeroMQ identity of its sockets."""

PageId = NewType("PageId", int)
"""Index of a page in one worker's page pool."""

Owner = NewType("Owner", str)
"""Who holds pages in a ledger: a request or a transfer."""


def peer_id(worker: WorkerId, incarnation: Incarnation) -> PeerId:
    """The name of one life of a process."""
    return PeerId(f"{worker}@{incarnation:016x}")
