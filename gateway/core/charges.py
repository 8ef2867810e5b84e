"""What one gateway has sent a worker that the worker's reports may not show yet. Pure.

A request is charged when its worker is selected, so that the next selection sees it. A report that answers Ping n shows
all that was sent before Ping n, because one connection keeps order: from then on it speaks for the request, also to
other gateways. Owns one entry per request from `add` to `remove`, whatever becomes of the request.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from common.ids import RequestId


@dataclass(slots=True)
class _Charge:
    sequence: float
    """Of the last Ping before the worker heard of it; infinite while it has not."""
    work_ms: float
    tokens: int


class Charges:
    """Of one worker's life."""

    def __init__(self) -> None:
        self._charges: dict[RequestId, _Charge] = {}
        self._reported = 0
        self.work_ms = 0.0
        """Predicted fetching and computing that reports do not show yet."""
        self.tokens = 0
        """Tokens of the requests that reports do not show yet."""
        self.requests = 0
        """Requests that reports do not show yet."""
        self.waiting = 0
        """Those of them whose prompts are not computed."""

    def __len__(self) -> int:
        """All requests of this gateway that live on the worker."""
        return len(self._charges)

    def add(self, request: RequestId, *, sequence: int | None, work_ms: float, tokens: int) -> None:
        """The request was sent after Ping `sequence`; None: others will tell the worker of it, see `arrived`."""
        self._charges[request] = _Charge(math.inf if sequence is None else sequence, work_ms, tokens)
        self.work_ms += work_ms
        self.tokens += tokens
        self.requests += 1
        self.waiting += work_ms > 0

    def arrived(self, request: RequestId, *, sequence: int) -> None:
        """The worker has it now: reports that answer a Ping after `sequence` show it. Unknown requests are ignored."""
        charge = self._charges.get(request)
        if charge is not None:
            charge.sequence = sequence

    def computed(self, request: RequestId) -> None:
        """Its prompt is computed: no work is left of it. Unknown requests are ignored."""
        charge = self._charges.get(request)
        if charge is not None:
            if charge.sequence >= self._reported:
                self.work_ms -= charge.work_ms
                self.waiting -= charge.work_ms > 0
            charge.work_ms = 0.0

    def remove(self, request: RequestId) -> None:
        """The request has left the worker. Unknown requests are ignored."""
        charge = self._charges.pop(request, None)
        if charge is not None and charge.sequence >= self._reported:
            self.work_ms -= charge.work_ms
            self.tokens -= charge.tokens
            self.requests -= 1
            self.waiting -= charge.work_ms > 0

    def on_report(self, sequence: int) -> None:
        """A report answers Ping `sequence`."""
        self._reported = sequence
        self.work_ms, self.tokens, self.requests, self.waiting = self._sums()  # anew, so that rounding never adds up

    def _sums(self) -> tuple[float, int, int, int]:
        open_ones = [charge for charge in self._charges.values() if charge.sequence >= self._reported]
        work_ms, tokens = sum(charge.work_ms for charge in open_ones), sum(charge.tokens for charge in open_ones)
        return work_ms, tokens, len(open_ones), sum(charge.work_ms > 0 for charge in open_ones)

    def check(self, left_ms: Mapping[RequestId, float]) -> None:
        """Just these requests live here, with so much work left, and the sums are theirs. Raises AssertionError with both."""
        charged = {request: charge.work_ms for request, charge in self._charges.items()}
        assert charged == left_ms, (charged, left_ms)
        work_ms, *others = self._sums()
        assert math.isclose(self.work_ms, work_ms, rel_tol=1e-9, abs_tol=1e-3), (self.work_ms, work_ms)
        assert others == [self.tokens, self.requests, self.waiting], (others, self.tokens, self.requests, self.waiting)
