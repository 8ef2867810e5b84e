"""Prompts of a prefill worker whose layers go to their decode worker while later ones compute. Pure.

Source: LayerKV (arXiv 2410.00428), layer-wise blocks; eLLM (arXiv 2506.15155), its prefill with a staging layer.

    begin --the grant--> granted --the one step of its prompt--> ended --all layers copied--> its pages are free
                                                                     --the hand-over ends--> forgotten

The copies are those of any hand-over; what differs is that the engine waits for their ends before it writes into a column of
pages again (layer_rings), and that it does not begin before there is a grant. A prompt takes its pages before it asks for the
grant, as every other does, so that nobody who holds a grant waits for pages that are held by somebody who waits for one. For
the same reason whoever begins later leaves the scratch that its step will need: that is taken only when the step is planned.
Whoever is over, for whatever reason, holds the engine back no longer: it computes on, for nobody.
"""

from dataclasses import dataclass, field

from common.ids import Owner
from common.messages.handover import KvSpan
from kvstore.index.ledger import PageIds, PageState
from services.worker.core.actions import Action, BeginRing, Moved, OpenRing
from services.worker.core.layer_rings import RING_LAYERS, OffloadRule, laid_out, writable_layer
from services.worker.core.lineup import Lineup
from services.worker.core.parking import Parking
from services.worker.core.prefix import PrefixReuse
from services.worker.core.room import Room
from services.worker.core.sequence import Sequence


@dataclass(slots=True)
class _Stream:
    """One prompt, from its pages until it is over."""

    sequence: Sequence
    leaving: tuple[int, ...]
    pages: PageIds
    """Its own, [pages]."""
    scratch_blocks: int
    """Blocks' worth of the pool that its step needs as scratch at the most."""
    left: list[int] = field(default_factory=list)
    """Layer -> blocks that have not been copied; none before its step."""
    first_copied: int = 0
    """Before it nothing has to be copied from its own pages."""
    n_free: int = 0
    """Of the layers that leave, how many are copied, from the first on."""
    ended: bool = False


class LayerStreams:
    """Owns the prompts that are computed so. Their pages belong to the sequences, which keep them while anybody reads."""

    def __init__(self, parts: tuple[PrefixReuse, Lineup, Room, Parking], rule: OffloadRule) -> None:
        self._reuse, self._lineup, self._room, self._orders = parts
        self._pool, self._rule = self._reuse.pool, rule
        self._layers = self._pool.pages_per_block
        self._open: dict[int, _Stream] = {}
        self._starved: set[int] = set()
        self._room.keep(self._kept_blocks)
        self.prompts_total = self.layers_total = 0

    # -- beginning

    def has_room(self, tokens: int, pinned_blocks: int, unpinned_blocks: int, *, loads: bool) -> bool:
        """Whether such a prompt of so many tokens would start at once; `pinned_blocks` of it are cached and pinned."""
        return not self._lineup.waiting and self._fits(tokens, pinned_blocks, 0)

    def fits_ever(self, tokens: int) -> bool:
        """Whether such a prompt has room when nobody else is here and nothing is cached."""
        pages = self._blocks(tokens, 0) * self._layers + self._rule.scratch_pages(tokens)
        return self._may(tokens, 0) and pages <= self._pool.usable_pages

    @property
    def usable_pages(self) -> int:
        """Of the pool, for anybody."""
        return self._pool.usable_pages

    def may_begin(self, sequence: Sequence) -> bool:
        """Whether a sequence that waits may begin so."""
        if not sequence.layer_wise or sequence.ring is not None or sequence is not self._lineup.waiting[0]:
            return False
        return self._hits(sequence) is not None

    def _hits(self, sequence: Sequence) -> int | None:
        """How many cached blocks it can take and have room for the rest: all, else those that others pin too; None: none."""
        hits, tokens = self._reuse.hits(sequence), len(sequence.tokens)
        pinned = self._pool.pinned_run(sequence.hashes[:hits])
        if self._fits(tokens, hits, hits - pinned):
            return hits
        return pinned if self._fits(tokens, pinned, 0) else None

    def _fits(self, tokens: int, hits: int, more_blocks: int) -> bool:
        """`more_blocks`: to take beside new ones."""
        if self._starved or not self._may(tokens, hits):
            return False
        scratch_blocks = max(0, self._scratch_blocks(tokens, hits) - self._kept_blocks())  # theirs serves its step, too
        return self._room.fits(more_blocks + self._blocks(tokens, hits) + scratch_blocks, len(self._lineup.running))

    def _scratch_blocks(self, tokens: int, hits: int) -> int:
        return -(-self._rule.scratch_pages(tokens - hits * self._reuse.block_tokens) // self._layers)

    def _kept_blocks(self) -> int:
        """What the largest step of those needs as scratch that have begun and were not in their step yet: one at a time is."""
        return max((one.scratch_blocks for one in self._open.values() if not one.left), default=0)

    def _may(self, tokens: int, hits: int) -> bool:
        computed = tokens - hits * self._reuse.block_tokens
        return computed <= self._rule.most_tokens and len(self._leaving(computed)) > RING_LAYERS

    def _blocks(self, tokens: int, hits: int) -> int:
        """Of the pool, for what is not cached."""
        n_new = -(-tokens // self._reuse.block_tokens) - hits
        leaving = self._leaving(tokens - hits * self._reuse.block_tokens)
        return -(-n_new * (RING_LAYERS + self._layers - len(leaving)) // self._layers)

    def _leaving(self, computed_tokens: int) -> tuple[int, ...]:
        return self._rule.leaving(self._layers, computed_tokens)

    def begin(self, sequence: Sequence) -> None:
        """Give it pages for the layers that stay, and the ring for the others."""
        hits, tokens = self._hits(sequence), len(sequence.tokens)
        assert hits is not None, "whoever begins was asked whether it may"
        leaving = self._leaving(tokens - hits * self._reuse.block_tokens)
        staying = tuple(layer for layer in range(self._layers) if layer not in leaving)
        n_taken, width = self._blocks(tokens, hits), RING_LAYERS + len(staying)
        scratch_blocks = self._scratch_blocks(tokens, hits)
        call = self._orders.next_call()

        def new_pages(n_blocks: int) -> PageIds:
            pages = self._pool.alloc(sequence.owner, n_taken, PageState.RESERVED).reshape(-1)
            self._open[call] = _Stream(sequence, leaving, pages, scratch_blocks)
            rows = pages[: n_blocks * width].reshape(n_blocks, width)
            return laid_out(leaving, staying, rows[:, :RING_LAYERS], rows[:, RING_LAYERS:])

        self._reuse.begin(sequence, new_pages, most_hits=hits)
        sequence.ring = call
        self.prompts_total += 1

    # -- the step

    def call_off(self, sequence: Sequence) -> None:
        """There is not the scratch for its step now: nobody new begins before it."""
        assert sequence.ring is not None
        self._starved.add(sequence.ring)

    @property
    def starved(self) -> int:
        """How many have all but scratch, which others must leave to them."""
        return len(self._starved)

    def is_starved(self, sequence: Sequence | None) -> bool:
        """Whether it is one of these."""
        return sequence is not None and sequence.ring in self._starved

    def step_begins(self, sequence: Sequence) -> None:
        """The step of its prompt is about to begin."""
        assert sequence.ring is not None and sequence.granted_block is not None
        one = self._open[sequence.ring]
        self._starved.discard(sequence.ring)
        one.first_copied = max(sequence.granted_block, sequence.cached_blocks)
        n_blocks = sequence.table.n_blocks - one.first_copied
        one.left = [n_blocks] * self._layers
        if n_blocks:
            self._orders.order(BeginRing(sequence.ring, writable_layer(one.leaving, 0, self._layers)))

    def on_layer(self, layer: int, n_layers: int) -> list[Action]:
        """The hand-over copies it."""
        return []

    def copied(self, sequence: Sequence | None, span: KvSpan) -> list[Action]:
        """Blocks of some layers of a sequence are with its decode worker: their pages may be written again."""
        one = self._open.get(sequence.ring) if sequence is not None and sequence.ring is not None else None
        if one is None or sequence is None or not one.left:
            return []
        n_blocks = span.first_block + span.n_blocks - max(span.first_block, one.first_copied)
        if n_blocks <= 0:
            return []
        for layer in range(span.layer, span.layer + span.n_layers):
            one.left[layer] -= n_blocks
        copied = next((n for n, layer in enumerate(one.leaving) if one.left[layer]), len(one.leaving))
        self._settle(one)
        if copied == one.n_free or sequence.ring is None:
            return []
        one.n_free = copied
        over = copied == len(one.leaving)
        return [OpenRing(sequence.ring, None if over else writable_layer(one.leaving, copied, self._layers))]

    def ended(self, sequence: Sequence) -> None:
        """The step of its prompt has ended: its pages go when the copies have ended."""
        assert sequence.ring is not None
        one = self._open[sequence.ring]
        one.ended = True
        self.layers_total += len(one.leaving)
        self._settle(one)

    def _settle(self, one: _Stream) -> None:
        if one.ended and one.left and not any(one.left) and one.pages.size:
            spent = Owner(f"spent/{one.sequence.ring}")
            self._pool.give(one.sequence.owner, one.pages, spent, PageState.ACTIVE)
            self._pool.release(spent)
            one.pages = one.pages[:0]

    def forget(self, sequence: Sequence) -> None:
        """The sequence is over, in whatever phase: nobody waits for its copies any more."""
        if sequence.ring is not None and self._open.pop(sequence.ring, None) is not None:
            self._starved.discard(sequence.ring)
            self._orders.order(OpenRing(sequence.ring, None))
            sequence.ring = None

    def open_all(self) -> list[Action]:
        """The process ends: let the engine go on."""
        return [OpenRing(call, None) for call in self._open]

    def on_moved(self, call: int, moved: Moved) -> bool:
        """Nothing goes to the host from here."""
        return False

    # -- state for others

    @property
    def calls(self) -> set[int]:
        """None: the host buffer is not used."""
        return set()

    def counters(self) -> dict[str, float]:
        """As in reports."""
        return {
            "layerwise_prompts_total": float(self.prompts_total),
            "layerwise_layers_total": float(self.layers_total),
        }
