"""KV as what it was computed from: every slot of a page remembers layer and tokens, so a wrong page shows as a wrong token."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from common.ids import RequestId
from common.messages.requests import TokenLogprob
from services.worker.core.plan import Sampled, Segment, StepPlan, StepResult
from tests.support.fake_engine import FakeEngine, computed_tokens, next_token

GARBAGE = -1
WRONG_TOKEN = 1
"""What the engine draws when it has read KV that is not its own; no right answer holds it."""

Page = tuple[int, ...]


@dataclass
class Memory:
    """Pages of one process. Contents: [slot] -> fingerprint of (layer, all tokens up to and with this one)."""

    block_tokens: int
    n_pages: int = 10**9
    """That have memory: who touches another one breaks its process."""
    lent: set[int] = field(default_factory=set)
    """Of those, the ones whose memory serves something else now."""
    pages: dict[int, Page] = field(default_factory=dict)
    drawn: dict[RequestId, int] = field(default_factory=dict)
    """What the last step drew, by request: the engine remembers it as long as its pages."""

    def resize(self, n_pages: int) -> None:
        """What was in pages that go is lost."""
        self.n_pages = n_pages
        self.pages = {page: contents for page, contents in self.pages.items() if page < n_pages}

    def lend(self, pages: range) -> None:
        """What was there is lost."""
        assert not self.lent.intersection(pages), f"{pages} are lent already"
        self.lent.update(pages)
        for page in pages:
            self.pages.pop(page, None)

    def take_back(self, pages: range) -> None:
        assert self.lent.issuperset(pages), f"{pages} are not lent"
        self.lent.difference_update(pages)

    def has(self, page: int) -> bool:
        return 0 <= page < self.n_pages and page not in self.lent

    def read(self, page: int) -> Page:
        assert self.has(page), f"page {page} of {self.n_pages} is read"
        return self.pages.get(page, (GARBAGE,) * self.block_tokens)

    def read_all(self, pages: Sequence[int]) -> list[Page]:
        return [self.read(page) for page in pages]

    def write_all(self, pages: Sequence[int], contents: Sequence[Page]) -> None:
        assert len(pages) == len(contents)
        assert all(self.has(page) for page in pages), f"{pages} of {self.n_pages} are written"
        self.pages.update(zip(pages, contents, strict=True))

    def set_slot(self, page: int, slot: int, value: int) -> None:
        contents = list(self.read(page))
        contents[slot] = value
        self.pages[page] = tuple(contents)


class MemoryEngine:
    """Draws the right token if all that it reads is there, else WRONG_TOKEN."""

    def __init__(self, *, layers: int, block_tokens: int) -> None:
        self._layers, self._block_tokens = layers, block_tokens
        self._rules = FakeEngine(layers=layers, block_tokens=block_tokens)

    def layer(self, plan: StepPlan, layer: int, memory: Memory, wrong: set[str]) -> None:
        """Compute one layer of a step: read what lies before, write the step's own. `wrong`: requests that read badly."""
        for segment in plan.segments:
            if not self._compute(segment, layer, memory, written=segment.request not in wrong):
                wrong.add(segment.request)

    def finish(self, plan: StepPlan, memory: Memory, wrong: set[str]) -> StepResult:
        """Draw the tokens."""
        self._rules.drawn = memory.drawn
        self._rules.step(plan, None)
        memory.drawn = {
            segment.request: WRONG_TOKEN
            if segment.request in wrong
            else next_token(computed_tokens(segment, memory.drawn))
            for segment in plan.segments
            if segment.sample
        }
        sampled = (Sampled(request, token, TokenLogprob(token, -1.0)) for request, token in memory.drawn.items())
        return StepResult(plan.number, tuple(sampled), 1.0)

    def _compute(self, segment: Segment, layer: int, memory: Memory, *, written: bool) -> bool:
        right, value, pages = written, layer, segment.table.ids[layer].tolist()
        for position, token in enumerate(computed_tokens(segment, memory.drawn)):
            value = hash((value, token))  # of all before it, too
            block, slot = divmod(position, self._block_tokens)
            page = pages[block]
            if position < segment.start:
                right = right and memory.read(page)[slot] == value
            else:
                memory.set_slot(page, slot, value if right else GARBAGE)
        return right
