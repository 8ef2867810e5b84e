"""Prompts that are computed although not all layers of their KV fit: layers go to the host while later ones compute. Pure.

For workers that answer such a prompt themselves; from a prefill worker its layers go to a decode worker (layer_streams).

Source: LayerKV (arXiv 2410.00428), sections on layer-wise blocks and retained layers; eLLM (arXiv 2506.15155), its prefill with
a staging layer.

    begin --the one step of its prompt--> ended --all layers copied--> parked, and its retained layers kept
          --(it begins again)--> the layers that are not on the device are fetched while its next step runs

Layers that leave share pages during the step (layer_rings). Retained layers are copied too, behind the others, so that
their pages can be had back at any moment, without waiting, once the step and its copies have ended.
"""

from dataclasses import dataclass, field

import numpy as np

from common.ids import Owner
from kvstore.index.ledger import PageIds, PageState
from services.worker.core.actions import Action, BeginRing, Moved, StoreBlocks
from services.worker.core.found import PARKED_TIER, FoundBlocks
from services.worker.core.host_buffer import HOST_BUFFER
from services.worker.core.layer_rings import RING_LAYERS, OffloadRule, laid_out, writable_layer
from services.worker.core.lineup import Lineup
from services.worker.core.outputs import finish_of
from services.worker.core.parking import Parking
from services.worker.core.prefix import PrefixReuse
from services.worker.core.retained import Kept, RetainedLayers, kept_owner
from services.worker.core.room import Room
from services.worker.core.sequence import Sequence


@dataclass(slots=True)
class _Offload:
    """One prompt, from its pages until all of its layers are in the buffer."""

    call: int
    sequence: Sequence | None
    """None: it was dropped."""
    leaving: tuple[int, ...]
    staying: tuple[int, ...]
    ring_pages: PageIds
    """[blocks, RING_LAYERS]."""
    kept_pages: PageIds
    """[blocks, staying layers]."""
    host_pages: PageIds
    """[whole blocks, layers]."""
    first_block: int = 0
    """Before it all was cached."""
    stepping: bool = False
    ended: bool = False
    stores: set[int] = field(default_factory=set)
    ok: bool = True

    @property
    def is_over_at_once(self) -> bool:
        """Its first token is its last, so nobody will read what its step writes: nothing is copied."""
        return self.sequence is not None and len(self.sequence.tokens) + 1 >= self.sequence.limit_tokens


class LayerOffload:
    """Owns the prompts that are computed so, one at a time, until all of their layers are in the buffer."""

    def __init__(
        self,
        parts: tuple[PrefixReuse, Lineup, Room, Parking],
        retained: RetainedLayers,
        rule: OffloadRule | None = None,
    ) -> None:
        """`retained`: where the layers that stayed are kept. `rule`: None if no prompt may be computed so."""
        self._reuse, self._lineup, self._room, self._parking = parts
        self._retained = retained
        self._pool, self._rule = self._reuse.pool, rule
        self._layers = self._pool.pages_per_block
        self._open: dict[int, _Offload] = {}
        self._by_store: dict[int, _Offload] = {}
        self.prompts_total = self.layers_total = 0

    # -- beginning

    def has_room(self, tokens: int, pinned_blocks: int, unpinned_blocks: int, *, loads: bool) -> bool:
        """As `Scheduler.has_room`, for a prompt whose layers would leave; it may go before who gave way for such.

        The same question as `may_begin`, before there is a sequence.
        """
        if self._rule is None or loads or not self._lineup.may_pass():
            return False
        return self._has_pages(tokens, pinned_blocks + unpinned_blocks, unpinned_blocks)

    def may_begin(self, sequence: Sequence) -> bool:
        """Whether a sequence that waits may begin so; all that wait before it let it pass."""
        began_before = sequence.found is not None or sequence.hit_tokens or sequence.reused_tokens is not None
        if self._rule is None or began_before or self._parking.is_leaving(sequence.request):
            return False
        if not self._lineup.may_pass(sequence.order):
            return False
        hits = self._reuse.hits(sequence)
        unpinned = hits - self._pool.pinned_run(sequence.hashes[:hits])
        return self._has_pages(len(sequence.tokens), hits, unpinned)

    def _has_pages(self, tokens: int, hits: int, unpinned: int) -> bool:
        computed = tokens - hits * self._reuse.block_tokens
        return self._fits(self._reuse.blocks_for(tokens) - hits, computed, unpinned)

    def _fits(self, n_new: int, tokens: int, more_blocks: int) -> bool:
        """Whether there are pages for such a prompt on both sides. `more_blocks`: of the device, beside its new ones."""
        assert self._rule is not None
        if self._open or tokens > self._rule.most_tokens:
            return False
        n_whole, leaving = (tokens - 1) // self._reuse.block_tokens, self._leaving(tokens)
        if n_whole < 1 or len(leaving) <= RING_LAYERS or not self._parking.buffer.admits(n_whole * self._layers):
            return False
        kept_blocks = -(-n_new * (self._layers - len(leaving)) // self._layers)
        ring_blocks = -(-n_new * RING_LAYERS // self._layers)
        return self._room.fits(more_blocks + kept_blocks + ring_blocks, len(self._lineup.running))

    def _leaving(self, tokens: int) -> tuple[int, ...]:
        assert self._rule is not None
        return self._rule.leaving(self._layers, tokens)

    def begin(self, sequence: Sequence) -> None:
        """Give it pages for the layers that stay, and the ring for the others."""
        self._lineup.pass_by(sequence.order)
        hits = self._reuse.hits(sequence)
        leaving = self._leaving(len(sequence.tokens) - hits * self._reuse.block_tokens)
        staying = tuple(layer for layer in range(self._layers) if layer not in leaving)
        n_whole = (len(sequence.tokens) - 1) // self._reuse.block_tokens - hits
        call, host_pages = self._parking.reserve(n_whole)
        one = _Offload(call, sequence, leaving, staying, host_pages, host_pages, host_pages, hits)

        def new_pages(n_blocks: int) -> PageIds:
            one.ring_pages = self._alloc(_ring(call), n_blocks, RING_LAYERS)
            one.kept_pages = self._alloc(sequence.owner, n_blocks, len(staying))
            return laid_out(leaving, staying, one.ring_pages, one.kept_pages)

        self._reuse.begin(sequence, new_pages)
        sequence.ring, sequence.streamed = call, True
        self._open[call] = one

    def _alloc(self, owner: Owner, n_blocks: int, layers: int) -> PageIds:
        """[blocks, layers] of some layers; the pool gives whole blocks, of which some pages may stay unused."""
        n_pages = n_blocks * layers
        given = self._pool.alloc(owner, -(-n_pages // self._layers), PageState.RESERVED) if n_pages else _NO_PAGES
        return given.reshape(-1)[:n_pages].reshape(n_blocks, layers)

    # -- the step

    def call_off(self, sequence: Sequence) -> None:
        """There is no scratch for so large a step: it waits like any other, until all of its layers fit."""
        assert sequence.ring is not None
        one = self._open[sequence.ring]
        one.sequence, one.ended = None, True
        self._settle(one)
        sequence.ring, sequence.streamed = None, False
        self._reuse.give_up(sequence)
        self._lineup.wait(sequence)

    def step_begins(self, sequence: Sequence) -> None:
        """The step of its prompt is about to begin."""
        assert sequence.ring is not None
        one = self._open[sequence.ring]
        one.stepping = True
        if not one.is_over_at_once:
            self._parking.order(BeginRing(one.call, writable_layer(one.leaving, 0, self._layers)))

    def on_layer(self, layer: int, n_layers: int) -> list[Action]:
        """The engine wrote K and V of `n_layers` layers, from `layer` on: those that leave are copied."""
        one = next((one for one in self._open.values() if one.stepping), None)
        if one is None or one.is_over_at_once:
            return []
        written = range(layer, layer + n_layers)
        return [self._store(one, (written_layer,)) for written_layer in written if written_layer in one.leaving]

    def _store(self, one: _Offload, layers: tuple[int, ...]) -> StoreBlocks:
        call, n_whole = self._parking.next_call(), len(one.host_pages)
        one.stores.add(call)
        self._by_store[call] = one
        if layers == one.staying:
            return StoreBlocks(call, HOST_BUFFER, one.kept_pages[:n_whole], one.host_pages[:, list(layers)])
        place = one.leaving.index(layers[0])
        free = writable_layer(one.leaving, place + 1, self._layers)
        own_pages = one.ring_pages[:n_whole, [place % RING_LAYERS]]
        last = place == len(one.leaving) - 1
        return StoreBlocks(
            call,
            HOST_BUFFER,
            own_pages,
            one.host_pages[:, list(layers)],
            ring=one.call,
            free_layer=None if last else free,
        )

    def ended(self, sequence: Sequence) -> None:
        """The step of its prompt has ended, and its token is known: its ring goes when the copies have ended."""
        assert sequence.ring is not None
        one = self._open[sequence.ring]
        one.stepping, one.ended = False, True
        self.prompts_total += 1
        self.layers_total += len(one.leaving)
        sequence.ring, sequence.streamed = None, False
        drew = len(sequence.tokens) > sequence.began_tokens
        if sequence.dropped or (drew and finish_of(sequence) is not None):
            one.sequence = None
        else:
            self._reuse.give_up(sequence, to=kept_owner(one.call))
            sequence.passed = 0
            self._lineup.wait(sequence)
            self._parking.hold(one.call, sequence.request)
            if one.staying:
                self._parking.order(self._store(one, one.staying))
        self._settle(one)

    def on_moved(self, call: int, moved: Moved) -> bool:
        """A copy to the host has ended; False if it is none of these."""
        one = self._by_store.pop(call, None)
        if one is None:
            return False
        one.stores.remove(call)
        one.ok = one.ok and moved.ok
        self._parking.stored_bytes_total += moved.n_bytes
        self._settle(one)
        return True

    def _settle(self, one: _Offload) -> None:
        if one.stores or not one.ended:
            return
        del self._open[one.call]
        self._parking.failures_total += not one.ok
        self._pool.release(_ring(one.call))
        if one.sequence is None or not one.ok:
            self._pool.release(kept_owner(one.call))
            self._parking.unhold(one.call, None if one.sequence is None else one.sequence.request)
            return
        tiers = (PARKED_TIER,) * len(one.host_pages)
        found = FoundBlocks(one.call, HOST_BUFFER, one.first_block, tiers, one.host_pages, float("inf"))
        self._parking.put(one.call, one.sequence, found)
        self._retained.keep(
            one.call, Kept(one.leaving, one.staying, one.kept_pages[: len(one.host_pages)], one.first_block)
        )

    def forget(self, sequence: Sequence) -> None:
        """The sequence is over, in whatever phase."""
        for one in list(self._open.values()):
            if one.sequence is sequence and not one.stepping:
                one.sequence, one.ended = None, True
                self._settle(one)

    # -- state for others

    @property
    def calls(self) -> set[int]:
        """Under which the buffer is used."""
        return set(self._open)

    def counters(self) -> dict[str, float]:
        """As in reports."""
        return {
            "layerwise_prompts_total": float(self.prompts_total),
            "layerwise_layers_total": float(self.layers_total),
        }


_NO_PAGES: PageIds = np.empty(0, np.int32)


def _ring(call: int) -> Owner:
    """Who owns the pages that layers take in turns."""
    return Owner(f"ring/{call}")
