"""Every sequence of a worker, from its arrival until nobody needs its pages any more. Pure."""

from collections.abc import Iterator

from common.ids import RequestId
from kvstore.index.block_pool import BlockPool
from kvstore.index.page_table import PageTable
from services.worker.core.sequence import NewPrompt, Sequence


class Sequences:
    """Owns the records. One leaves when it is dropped and neither a step, nor a copy, nor a load uses its pages."""

    def __init__(self, pool: BlockPool, layers: int, context_tokens: int) -> None:
        """`context_tokens`: no sequence grows longer."""
        self._pool, self._layers, self._context_tokens = pool, layers, context_tokens
        self._sequences: dict[RequestId, Sequence] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, request: RequestId) -> bool:
        """Also one that is dropped."""
        return request in self._sequences

    def __getitem__(self, request: RequestId) -> Sequence:
        """Also one that is dropped."""
        return self._sequences[request]

    def __iter__(self) -> Iterator[Sequence]:
        """All, those that are dropped too."""
        return iter(self._sequences.values())

    def add(self, prompt: NewPrompt) -> Sequence:
        """A new one, without pages. Raises ValueError if the request is here already."""
        if prompt.request in self._sequences:
            raise ValueError(f"request {prompt.request} is here already")
        self._arrivals += 1
        prompt_tokens = len(prompt.tokens) - prompt.emitted_tokens
        sequence = Sequence(
            request=prompt.request,
            order=self._arrivals,
            tokens=list(prompt.tokens),
            prompt_tokens=prompt_tokens,
            known_tokens=len(prompt.tokens),
            limit_tokens=min(prompt_tokens + prompt.sampling.max_tokens, self._context_tokens),
            sampling=prompt.sampling,
            table=PageTable(self._layers),
            root=prompt.root,
            hashes=list(prompt.hashes),
            found=prompt.found,
            streamed=prompt.streamed,
            layer_wise=prompt.layer_wise,
        )
        self._sequences[prompt.request] = sequence
        return sequence

    def get(self, request: RequestId) -> Sequence | None:
        """The sequence, unless it is unknown or dropped."""
        sequence = self._sequences.get(request)
        return None if sequence is None or sequence.dropped else sequence

    def hold(self, request: RequestId) -> None:
        """Keep the pages of a sequence, even if it is dropped, until `unhold`."""
        self._sequences[request].held = True

    def unhold(self, request: RequestId) -> None:
        """Nobody outside reads the pages any more."""
        sequence = self._sequences[request]
        sequence.held = False
        self.free_if_idle(sequence)

    def free_if_idle(self, sequence: Sequence) -> None:
        """Forget a dropped sequence, and free its pages, once nobody uses them."""
        busy = sequence.in_steps > 0 or sequence.held or sequence.loading is not None
        if sequence.dropped and not busy:
            self._pool.release(sequence.owner)
            del self._sequences[sequence.request]
