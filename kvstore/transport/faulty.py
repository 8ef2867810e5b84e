"""Fault injection around a channel, seeded: the same seed and copies give the same faults."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from common.errors import PeerFailed
from common.messages.handover import KvSpan
from kvstore.transport.channel import Channel, Copied


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What goes wrong, each as a share of all copies between 0 and 1."""

    seed: int = 0
    delay_share: float = 0.0
    delay_ms: float = 0.0
    fail_share: float = 0.0
    corrupt_share: float = 0.0
    """One page of the span gets another page's bytes."""


class FaultyChannel:
    """A channel that delays, fails and corrupts some of its copies."""

    def __init__(
        self, inner: Channel, faults: Faults, n_source_pages: int, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        """`n_source_pages`: pages of the local pool, from which wrong ones are taken. `sleep` takes seconds."""
        self._inner, self._faults, self._n_source_pages, self._sleep = inner, faults, n_source_pages, sleep
        self._random = Random(faults.seed)
        self.injected_total = 0

    @property
    def kind(self) -> str:
        """That of the channel inside."""
        return self._inner.kind

    def posted(self, span: KvSpan) -> None:
        """As the channel inside."""
        self._inner.posted(span)

    def copy(self, span: KvSpan, source_pages: Sequence[int], target_pages: Sequence[int]) -> Copied:
        """As the channel inside, with faults. Raises PeerFailed."""
        delay, fail, corrupt = (self._random.random() for _ in range(3))
        if delay < self._faults.delay_share:
            self.injected_total += 1
            self._sleep(self._faults.delay_ms / 1000)
        if fail < self._faults.fail_share:
            self.injected_total += 1
            raise PeerFailed(f"injected failure of layer {span.layer}")
        if corrupt < self._faults.corrupt_share and source_pages:
            self.injected_total += 1
            source_pages = [(source_pages[0] + 1) % self._n_source_pages, *source_pages[1:]]
        return self._inner.copy(span, source_pages, target_pages)

    def close(self) -> None:
        """Close the channel inside."""
        self._inner.close()
