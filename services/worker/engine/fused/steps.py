"""The ways in which a step is queued on the device: decode steps and short ones of fixed sizes, and any other."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.choose import choose_tokens
from services.worker.core.plan import Segment
from services.worker.engine.attention import LayerHooks
from services.worker.engine.batch import count_decodes
from services.worker.engine.fused.attention import PagedStep, StepPlaces, StepShape, step_shape
from services.worker.engine.fused.inputs import StepBuffers
from services.worker.engine.fused.lane import Lane
from services.worker.engine.fused.tables import BlockTables, layer_slots, layer_tables
from services.worker.engine.make import SHORT_TOKENS, EngineLimits
from services.worker.model.fused import FusedDecoder

SHORT_SEQUENCES = 32
"""Of a short step at the most: its kernels are launched for so many."""
SHORT_KEYS = 4096
"""Of each of them: with more, few queries must share one sequence's keys between programs, which graphs do not."""
NO_HOOKS = LayerHooks()


class Steps:
    """Owns the device's side of a step: its inputs, the block tables and the tokens drawn last.

    Everything is queued on the current stream, at addresses that never change, so that it may be captured.
    """

    def __init__(
        self, decoder: FusedDecoder, pages: Tensor, limits: EngineLimits, block_tokens: int, lane: Lane
    ) -> None:
        device = pages.device
        self.pages = pages
        self._decoder, self._block_tokens, self._context_tokens = decoder, block_tokens, limits.context_tokens
        self.any = StepBuffers(limits.max_step_tokens + limits.max_running, device, lane)
        """Inputs of steps of any size."""
        self.short = StepBuffers(max(SHORT_TOKENS, SHORT_SEQUENCES), device, lane)
        self.decode = StepBuffers(limits.max_running, device, lane)
        blocks = -(-limits.context_tokens // block_tokens)
        self.tables = BlockTables(limits.max_running, blocks, device, lane)
        self.drawn = torch.zeros(limits.max_running, dtype=torch.int64, device=device)
        """[max_running] int64: the tokens drawn last, in the order of their segments."""
        self.logits = torch.zeros(limits.max_running, decoder.vocab_tokens, dtype=pages.dtype, device=device)
        """[max_running, vocab]: what they were drawn from."""

    def decode_step(self, rows: int) -> None:
        """One token for each of `rows` sequences, drawn on the device; inputs are the decode buffers."""
        fields = self.decode.device
        shape = StepShape(decodes=rows, decode_keys=self._context_tokens)
        hidden = self._run(fields, rows, shape, self._places(fields, rows, rows, 0), NO_HOOKS)
        self._draw(fields, hidden)

    def short_step(self, tokens: int) -> None:
        """`tokens` rows of up to SHORT_SEQUENCES sequences, every one a run of queries; inputs are the short buffers."""
        fields, sequences = self.short.device, min(SHORT_SEQUENCES, self.decode.rows)
        shape = StepShape(decodes=0, decode_keys=0, runs=sequences, longest_run=tokens)
        places = self._places(fields, tokens, sequences, sequences)
        hidden = self._run(fields, tokens, shape, places, NO_HOOKS)
        self._draw(fields, hidden.index_select(0, fields["sample_rows"][:sequences]))

    def any_step(self, segments: Sequence[Segment], hooks: LayerHooks, n_drawn: int, *, whole: bool) -> None:
        """Any segments, operator by operator; inputs are the buffers for any size.

        `whole`: the block tables hold these segments. `n_drawn` tokens are drawn.
        """
        fields, shape = self.any.device, step_shape(segments)
        n_tokens = sum(segment.count for segment in segments)
        places = self._places(fields, n_tokens, len(segments), len(segments) - count_decodes(segments))
        if not whole:
            device = self.pages.device
            places = StepPlaces(
                tables=layer_tables(segments, device),
                slots=layer_slots(segments, self._block_tokens, device),
                lengths=places.lengths,
                query_starts=places.query_starts,
            )
        hidden = self._run(fields, n_tokens, shape, places, hooks)
        if n_drawn:
            self._draw(fields, hidden.index_select(0, fields["sample_rows"][:n_drawn]))

    def _places(self, fields: dict[str, Tensor], tokens: int, sequences: int, runs: int) -> StepPlaces:
        return StepPlaces(
            tables=self.tables.device[None, :sequences],
            slots=fields["slots"][None, :tokens],
            lengths=fields["lengths"][:sequences],
            query_starts=fields["query_starts"][: runs + 1],
        )

    def _run(
        self, fields: dict[str, Tensor], tokens: int, shape: StepShape, places: StepPlaces, hooks: LayerHooks
    ) -> Tensor:
        pending = fields["pending"][:tokens]
        ids = torch.where(pending < 0, fields["ids"][:tokens], self.drawn[pending.clamp(min=0)])
        attention = PagedStep(self.pages, shape, places, hooks)
        return self._decoder.run(ids, fields["positions"][:tokens], attention)

    def _draw(self, fields: dict[str, Tensor], hidden: Tensor) -> None:
        """Draw a token from each row of hidden states."""
        rows = hidden.shape[0]
        logits = self._decoder.logits_into(self.logits[:rows], hidden)
        how = (fields[name][:rows] for name in ("temperatures", "top_k", "top_p", "min_p", "chances"))
        self.drawn[:rows].copy_(choose_tokens(logits, *how))
