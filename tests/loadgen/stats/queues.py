"""Queues with known laws, as records: the ground truth that verdicts are tested against."""

import heapq

import numpy as np
from numpy.typing import NDArray

from loadgen.results.records import RequestRecord
from tests.loadgen.records import record


def queue(rng: np.random.Generator, arrivals_s: NDArray[np.float64], servers: int) -> list[RequestRecord]:
    """First come, first served, exponential service with a mean of one second. One token each, at the end."""
    free_s = [0.0] * servers
    found = []
    for index, (at_s, service_s) in enumerate(zip(arrivals_s, rng.exponential(1.0, len(arrivals_s)), strict=True)):
        start_s = max(at_s, heapq.heappop(free_s))
        end_s = float(start_s + service_s)
        heapq.heappush(free_s, end_s)
        found.append(
            record(
                index=index,
                conversation=index,
                planned_s=float(at_s),
                sent_s=float(at_s),
                end_s=end_s,
                output_tokens=1,
                chunk_s=(end_s,),
                chunk_tokens=(1,),
            )
        )
    return found


def poisson_queue(seed: int, load: float, servers: int, n_requests: int) -> list[RequestRecord]:
    """M/M/c that starts empty; `load` 1: as much comes as can be served."""
    rng = np.random.default_rng(seed)
    gaps_s = rng.exponential(1 / (load * servers), n_requests)
    return queue(rng, np.cumsum(gaps_s), servers)
