"""One prompt on its way through a prefill worker."""

from dataclasses import dataclass, field

from common.block_hash import BlockHash
from common.ids import PeerId, TransferId, WorkerId
from common.messages.actions import Send
from common.messages.handover import GrantRequest, KvSpan
from common.messages.requests import Failed, Generate, Timings
from common.policy.transfer import Granularity
from kvstore.handover.actions import GaveUp
from kvstore.handover.outgoing import FirstToken
from services.worker.core.found import FoundBlocks
from services.worker.core.scheduler import NewToken
from services.worker.core.sequence import NewPrompt, Sequence


@dataclass(slots=True, eq=False)
class Prompt:
    """Mutable record, owned by the PrefillCore."""

    message: Generate
    gateway: PeerId
    arrived_ms: float
    deadline_ms: float
    root: BlockHash
    """What the names of its blocks start from."""
    tokens: tuple[int, ...] = field(init=False)
    """To compute: the prompt, and behind it what an earlier worker emitted."""
    transfer: TransferId | None = None
    decode: PeerId | None = None
    sequence: Sequence | None = None
    began_ms: float | None = None
    """When the first step that computes a part of it began."""
    names: list[BlockHash] = field(default_factory=list)
    """Of the blocks that may be reused: all whole ones but for the last token."""
    looked_up: bool = False
    """The KV store was asked for it, or need not be."""
    leader: Sequence | None = None
    """Who computes blocks that it waits for."""
    shared_blocks: int = 0
    """Leading blocks that it waits for, or last waited for."""
    mode: Granularity = Granularity.LAYER
    """Of its transfer."""
    layer_wise: bool = False
    """It began without pages for all of its layers."""
    granted_ms: float | None = None
    computed_ms: float | None = None
    copied: int = 0
    """Copies of its pages that have ended."""
    told: bool = False
    """The gateway knows the outcome, or has cancelled."""

    def __post_init__(self) -> None:
        """Put together what is computed as one prompt."""
        self.tokens = self.message.prompt + self.message.emitted

    @property
    def decode_worker(self) -> WorkerId:
        """Who takes it over; a prompt without one is refused on arrival."""
        assert self.message.decode is not None, "no decode worker was named"
        return self.message.decode

    @property
    def decode_life(self) -> tuple[WorkerId, PeerId | None]:
        """The same, with the one life of it that its gateway hears."""
        return self.decode_worker, self.message.decode_peer

    @property
    def waits(self) -> bool:
        """Whether it has no pages."""
        return self.sequence is None or not self.sequence.table.n_blocks

    @property
    def phase(self) -> str:
        """Where it is, in the words of messages.requests.Failed."""
        if self.transfer is None:
            return "prefill_queue"
        if self.computed_ms is None:
            return "prefill"
        return "grant" if self.granted_ms is None else "transfer"

    def sequence_for(self, found: FoundBlocks | None) -> NewPrompt:
        """As the scheduler wants it; `found`: what the KV store keeps for it."""
        message = self.message
        return NewPrompt(
            request=message.request,
            tokens=self.tokens,
            emitted_tokens=len(message.emitted),
            sampling=message.sampling,
            root=self.root,
            hashes=tuple(self.names),
            streamed=True,
            found=found,
            layer_wise=self.layer_wise,
        )

    def grant_request(self, transport: str, now_ms: float) -> GrantRequest:
        """The request for pages, once it has a transfer."""
        assert self.transfer is not None, "a prompt without a transfer asks for nothing"
        message = self.message
        return GrantRequest(
            transfer=self.transfer,
            request=message.request,
            gateway=self.gateway,
            prompt=message.prompt,
            sampling=message.sampling,
            timeout_ms=max(1, round(self.deadline_ms - now_ms)),
            transport=transport,
            cache_salt=message.cache_salt,
            emitted=message.emitted,
        )

    def note_grant(self, first_block: int, now_ms: float) -> None:
        """The decode worker has pages for its blocks from `first_block` on."""
        assert self.sequence is not None, "a prompt that was never started asks for nothing"
        self.granted_ms, self.sequence.granted_block = now_ms, first_block

    def finish(self, new: NewToken, now_ms: float) -> FirstToken:
        """The prompt is computed: what goes to the decode worker."""
        self.computed_ms = now_ms
        cached_tokens, timings = new.sequence.reused_prompt_tokens, self.timings(now_ms)
        return FirstToken(token=new.token, logprob=new.logprob, cached_tokens=cached_tokens, timings=timings)

    def timings(self, now_ms: float) -> Timings:
        """Where its time on this worker has gone so far."""
        if self.began_ms is None:
            return Timings(prefill_queue_ms=now_ms - self.arrived_ms)
        computed_ms = now_ms if self.computed_ms is None else self.computed_ms
        granted_ms = now_ms if self.granted_ms is None else max(self.granted_ms, computed_ms)
        return Timings(
            prefill_queue_ms=self.began_ms - self.arrived_ms,
            compute_ms=computed_ms - self.began_ms,
            grant_wait_ms=granted_ms - computed_ms,
            transfer_ms=now_ms - granted_ms,
        )

    def source_pages(self, span: KvSpan) -> tuple[int, ...]:
        """Our pages that hold a span of a prompt that was started."""
        assert self.sequence is not None, "a prompt that was never started has no pages"
        blocks = slice(span.first_block, span.first_block + span.n_blocks)
        pages = self.sequence.table.ids[span.layer : span.layer + span.n_layers, blocks]
        return tuple(pages.T.ravel().tolist())

    def tell_ended(self, code: str, text: str, now_ms: float, *, retryable: bool) -> list[Send]:
        """It ends where it is now."""
        return self.tell(code, f"{text} (phase {self.phase})", now_ms=now_ms, retryable=retryable)

    def tell_gave_up(self, step: GaveUp, now_ms: float) -> list[Send]:
        """The hand-over failed."""
        return self.tell(step.code, step.text, now_ms=now_ms, phase=step.phase, retryable=step.retryable)

    def tell(
        self, code: str, text: str, *, now_ms: float | None = None, phase: str | None = None, retryable: bool = False
    ) -> list[Send]:
        """Failed for the gateway, unless it knows already. `phase` None: where the prompt is now. `now_ms`: tell the time
        that it took, too.
        """
        if self.told:
            return []
        self.told = True
        failed = Failed(
            request=self.message.request,
            code=code,
            phase=phase or self.phase,
            text=text,
            retryable=retryable,
            transfer=self.transfer,
            timings=None if now_ms is None else self.timings(now_ms),
        )
        return [Send(self.gateway, failed)]
