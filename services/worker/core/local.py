"""Prompts that this worker computes and answers itself, until they start. Pure.

Owns the queue of a mixed worker. An entry leaves by starting, by a cancel, by its deadline, with its gateway, or when the
worker ends. The first few are prepared while they wait: what the KV store has of them is looked up, and what they
displace is saved.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from common.block_hash import BlockHash, hash_blocks
from common.ids import PeerId, RequestId
from common.kv_layout import KvLayout
from common.messages.actions import Send
from common.messages.requests import Failed, Generate, Timings
from common.policy.urgency import rank_ms
from services.worker.core.actions import Action
from services.worker.core.generation import Generation
from services.worker.core.kv_cache import KvCache
from services.worker.core.preparation import Preparation
from services.worker.core.sequence import NewPrompt, Sequence
from services.worker.core.slo import PromptGate
from services.worker.core.waiting import WaitingPrompt
from services.worker.core.watchdog import Wait
from services.worker.core.wire import too_large

_PREPARE_AHEAD = 2


@dataclass(slots=True, eq=False)
class _Waiting:
    message: Generate
    tokens: tuple[int, ...]
    gateway: PeerId
    root: BlockHash
    names: list[BlockHash]
    arrived_ms: float
    looked_up: bool = False
    leader: Sequence | None = None
    shared_blocks: int = 0
    held_from_ms: float | None = None

    @property
    def deadline_ms(self) -> float:
        return self.arrived_ms + self.message.timeout_ms

    @property
    def rank_ms(self) -> float:
        return rank_ms(self.arrived_ms, self.message.priority)


class LocalPrompts:
    """By priority and arrival, as far as room, the gate and lookups allow; who waits for a sibling lets others pass."""

    def __init__(
        self,
        generation: Generation,
        cache: KvCache,
        preparation: Preparation,
        gate: PromptGate,
        block_tokens: int,
    ) -> None:
        self._generation, self._cache, self._preparation = generation, cache, preparation
        self._gate, self._block_tokens = gate, block_tokens
        self.held_total = 0
        """Prompts that had room and were held all the same, for the sake of answers."""
        self._waiting: dict[RequestId, _Waiting] = {}  # in the order in which they go

    def __contains__(self, request: RequestId) -> bool:
        return request in self._waiting

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def prompts(self) -> Iterable[WaitingPrompt]:
        """All that wait."""
        return self._waiting.values()

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens of all that wait."""
        return sum(len(one.tokens) for one in self._waiting.values())

    def add(self, message: Generate, gateway: PeerId, root: BlockHash, now_ms: float) -> None:
        """Queue a request that was checked. `root`: what the names of its blocks start from."""
        tokens = message.prompt + message.emitted
        names = hash_blocks(tokens[:-1], root, self._block_tokens)
        self._waiting[message.request] = _Waiting(message, tokens, gateway, root, names, now_ms)
        self._generation.watch.arrived(message.request, now_ms)
        if any(one.rank_ms > self._waiting[message.request].rank_ms for one in self._waiting.values()):
            self._waiting = dict(sorted(self._waiting.items(), key=lambda entry: entry[1].rank_ms))  # stable

    def pump(self, now_ms: float) -> list[Action]:
        """Start what may start."""
        actions: list[Action] = []
        unready = 0
        for request, one in list(self._waiting.items()):
            if unready == _PREPARE_AHEAD:
                break
            if self._preparation.holds(one):
                continue
            ready, steps = self._preparation.advance(one, now_ms)
            actions += steps
            if not ready:
                unready += 1
                continue
            if not self._preparation.has_room(one) or self._is_held(one, now_ms):
                break
            del self._waiting[request]
            self._start(one)
        return actions

    def _is_held(self, one: _Waiting, now_ms: float) -> bool:
        """Asked again at every event; the tokens of those for whose sake it is held are such events."""
        held = not self._gate.admits(one, now_ms, one.held_from_ms)
        if held and one.held_from_ms is None:
            self.held_total += 1
            one.held_from_ms = now_ms
        return held

    def _start(self, one: _Waiting) -> None:
        message = one.message
        prompt = NewPrompt(
            request=message.request,
            tokens=one.tokens,
            emitted_tokens=len(message.emitted),
            sampling=message.sampling,
            root=one.root,
            hashes=tuple(one.names),
            found=self._cache.take(message.request),
        )
        self._generation.start(prompt, one.gateway, one.arrived_ms, one.deadline_ms)

    def waits(self, now_ms: float) -> list[Wait]:
        """What each of them waits for."""
        return [
            Wait(
                request=request,
                phase="prefill_queue",
                age_ms=now_ms - one.arrived_ms,
                waits_for="a lookup" if self._cache.asks_for(request) else "room, its turn, or a sibling's blocks",
                queued=True,
            )
            for request, one in self._waiting.items()
        ]

    def cancel(self, request: RequestId) -> list[Action]:
        """The request is over. Unknown requests are ignored."""
        if self._waiting.pop(request, None) is not None:
            self._generation.watch.forget(request)
        return self._cache.forget(request)

    def on_tick(self, now_ms: float) -> list[Action]:
        """Ends requests whose time is up."""
        late = [request for request, one in self._waiting.items() if now_ms >= one.deadline_ms]
        return self._fail(late, "deadline_exceeded", "the request's time ran out", retryable=False, now_ms=now_ms)

    def end_too_large(self, layout: KvLayout, total_pages: int, now_ms: float) -> list[Action]:
        """Ends requests that need more pages than there are."""
        actions: list[Action] = []
        for request, one in list(self._waiting.items()):
            pages = layout.pages_at_most(len(one.message.prompt), one.message.sampling.max_tokens)
            if text := too_large(pages, total_pages):
                actions += self._fail([request], "out_of_pages", text, retryable=False, now_ms=now_ms)
        return actions

    def forget_gateway(self, gateway: PeerId, now_ms: float) -> list[Action]:
        """The gateway fell silent. It is told all the same: if it only paused, it must not wait for ever."""
        mine = [request for request, one in self._waiting.items() if one.gateway == gateway]
        text = f"gateway {gateway} was silent for too long"
        return self._fail(mine, "peer_failed", text, retryable=True, now_ms=now_ms)

    def abandon(self, text: str) -> list[Action]:
        """This worker ends: tell every gateway that still waits."""
        return self._fail(list(self._waiting), "peer_failed", text, retryable=True)

    def _fail(
        self, requests: list[RequestId], code: str, text: str, *, retryable: bool, now_ms: float | None = None
    ) -> list[Action]:
        actions: list[Action] = []
        for request in requests:
            one = self._waiting[request]
            failed = Failed(
                request=request,
                code=code,
                phase="prefill_queue",
                text=text,
                retryable=retryable,
                timings=None if now_ms is None else Timings(prefill_queue_ms=now_ms - one.arrived_ms),
            )
            actions += [Send(one.gateway, failed), *self.cancel(request)]
        return actions
