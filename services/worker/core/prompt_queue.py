"""Prompts of a prefill worker that have not started. Pure.

Owns the order in which they wait. One leaves when it starts, or when it ends before that.
"""

from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterator

from common.ids import PeerId
from common.policy.urgency import rank_ms
from services.worker.core.actions import Action
from services.worker.core.layer_streams import LayerStreams
from services.worker.core.parts import Parts
from services.worker.core.preparation import Preparation
from services.worker.core.prompt import Prompt

_ASK_AHEAD = 2
"""Transfers that may wait for one decode worker's grant: the prompt being computed and the one after it."""
_CONNECT_GRACE_MS = 2_000.0
"""How long a prompt waits for a decode worker that is only just being connected."""


class PromptQueue:
    """By priority and arrival; who waits for its decode worker or a sibling lets others pass, who lacks room does not."""

    def __init__(self, parts: Parts, streams: LayerStreams) -> None:
        self._neighbours, self._preparation, self._streams = parts.neighbours, Preparation(parts), streams
        self._waiting: list[Prompt] = []

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self._waiting)

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, prompt: Prompt) -> None:
        """One that was not refused."""
        insort(self._waiting, prompt, key=lambda queued: rank_ms(queued.arrived_ms, queued.message.priority))

    def remove(self, prompt: Prompt) -> None:
        """It ends before it has started."""
        self._waiting.remove(prompt)

    def meant_for(self, decode: PeerId) -> list[Prompt]:
        """Those that will ask this decode worker for pages."""
        return [p for p in self._waiting if self._neighbours.ready(*p.decode_life) == decode]

    def unreachable(self, now_ms: float) -> list[tuple[Prompt, str]]:
        """Whose decode worker is not connected lets others pass for a moment, then fails, wherever it stands: with this text."""
        late = [p for p in self._waiting if now_ms - p.arrived_ms >= _CONNECT_GRACE_MS]
        lost = [p for p in late if self._neighbours.ready(*p.decode_life) is None]
        why_not = self._neighbours.why_not
        return [(p, f"decode worker {p.decode_worker} cannot be reached: {why_not(*p.decode_life)}") for p in lost]

    def advance(
        self, asking: Counter[PeerId], start: Callable[[Prompt, PeerId, float], list[Action]], now_ms: float
    ) -> list[Action]:
        """Prepare prompts and start them, in order, while there are pages and not too many wait for their grant.

        `asking`: how many wait for a grant of each decode worker. `start`: of one that has left, with its decode worker.
        """
        actions: list[Action] = []
        for prompt in list(self._waiting):
            decode = self._neighbours.ready(*prompt.decode_life)
            if decode is None or asking[decode] >= _ASK_AHEAD or self._preparation.holds(prompt):
                continue  # the decode worker is being connected, or full, or a sibling computes its blocks; others may pass
            asking[decode] += 1
            ready, steps = self._preparation.advance(prompt, now_ms)
            actions += steps
            if ready and (self._streams.starved or not self._preparation.has_room(prompt)):
                break
            if ready:
                self._waiting.remove(prompt)
                prompt.layer_wise = not self._preparation.has_room_for_all(prompt)
                actions += start(prompt, decode, now_ms)
        return actions
