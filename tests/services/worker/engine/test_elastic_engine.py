"""A real engine whose scratch and KV are one memory that goes to and fro draws what it draws with memory of its own."""

import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from common.block_hash import BlockHash
from common.ids import RequestId
from common.kv_layout import KvLayout
from common.messages.requests import Sampling
from common.policy.batching import DecodeFirst
from common.policy.elastic import ArenaTerms
from common.policy.eviction import Lru
from kvstore.index.block_pool import BlockPool
from kvstore.index.ledger import Ledger
from kvstore.memory.chunks import ChunkPool
from kvstore.memory.lending import ChunkLending
from kvstore.memory.memfd import MemfdBackend
from kvstore.memory.page_pool import PagePool
from services.worker.chunk_lender import ChunkLender
from services.worker.core.elastic import ElasticScratch
from services.worker.core.pool_memory import NOTHING_LENT, PoolMemory
from services.worker.core.prefix import Keep, PrefixReuse
from services.worker.core.scheduler import Scheduler
from services.worker.core.sequence import NewPrompt
from services.worker.engine.engine import TorchEngine
from services.worker.inbox import Events
from services.worker.model.load import LoadedModel, load_model
from tests.services.worker.engine.test_parity import prompt_of

MAX_ROWS, CONTEXT, CHUNK_PAGES, N_CHUNKS = 320, 400, 8, 30
ROOT = BlockHash(bytes(16))


class Worker:
    """Everything between a request and its tokens, without processes and messages."""

    def __init__(self, model: LoadedModel, mode: str) -> None:
        layout: KvLayout = model.layout
        chunk_bytes = CHUNK_PAGES * layout.page_bytes
        self.chunks = ChunkPool(MemfdBackend(N_CHUNKS * chunk_bytes), N_CHUNKS * chunk_bytes, chunk_bytes)
        self.pages = PagePool(self.chunks, layout)
        self.pages.grow(N_CHUNKS)
        self.lending = ChunkLending(self.pages, self.chunks, threading.Lock())
        self.engine = TorchEngine(model, self.pages.tensor, layout)
        self.lender = ChunkLender(self.lending, Events(lambda: None), use_scratch=self.engine.use_scratch)
        pool = BlockPool(Ledger(self.pages.n_pages), layout.layers, Lru())
        terms = ArenaTerms(
            step=self.engine.scratch_terms,
            chunk_bytes=chunk_bytes,
            chunk_pages=CHUNK_PAGES,
            max_rows=MAX_ROWS,
            least_rows=48,
            max_keys=CONTEXT,
        )
        self.memory = NOTHING_LENT if mode == "off" else PoolMemory(ElasticScratch(pool, terms, mode))
        self.memory.carry_out_with(self.lender.carry_out)
        reuse = PrefixReuse(pool, Keep.PROMPTS, layout.block_tokens, self.memory)
        policy = DecodeFirst(MAX_ROWS, layout.block_tokens)
        self.scheduler = Scheduler(reuse, layout, policy, max_running=8, context_tokens=CONTEXT)
        self.outputs: dict[RequestId, list[int]] = {}
        self.most_running = 0

    def step(self) -> bool:
        plan = self.scheduler.plan()
        self.scheduler.take_started()
        if plan is None:
            return False
        self.most_running = max(self.most_running, self.scheduler.n_running)
        for new in self.scheduler.complete(self.engine.collect(self.engine.launch(plan, None, None))):
            sequence = new.sequence
            if sequence.generated_tokens == sequence.sampling.max_tokens:
                self.outputs[sequence.request] = sequence.tokens[sequence.prompt_tokens :]
                self.scheduler.drop(sequence.request)
        self.memory.scratch.check()
        return True

    def serve(self) -> dict[RequestId, list[int]]:
        """Requests of all lengths, arriving while others run."""
        rng = random.Random(5)
        for number in range(14):
            prompt = tuple(prompt_of(rng.choice((5, 150, 300)), seed=number % 7))
            sampling = Sampling(max_tokens=rng.choice((2, 30)), temperature=0.0)
            self.scheduler.submit(
                NewPrompt(request=RequestId(f"r{number}"), tokens=prompt, sampling=sampling, root=ROOT)
            )
            if number % 3 == 0:
                self.step()
        while self.step():
            pass
        return self.outputs

    def close(self) -> None:
        self.lending.close()
        self.pages.close()
        self.chunks.close()


@pytest.mark.long
@pytest.mark.parametrize("mode", ["static", "kv"])
def test_tokens_are_those_of_an_engine_with_memory_of_its_own(
    mode: str, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("spans", "engine"):  # so that steps of this size differ in what they need
        monkeypatch.setattr(f"services.worker.engine.{module}.GROUP_KEYS", 96)
    model = load_model(checkpoint("qwen3"))
    one, other = Worker(model, "off"), Worker(model, mode)
    assert other.serve() == one.serve()
    scratch = other.memory.scratch
    assert isinstance(scratch, ElasticScratch)
    assert (scratch.lent_chunks_total > 0, scratch.returned_chunks_total > 0) == (mode == "kv", mode == "kv")
    one.close()
    other.close()
