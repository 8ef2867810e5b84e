"""Sequences that are read where views show them get the answers that gathering and transformers give."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import ConfigError
from common.ids import RequestId
from kernels.pages import PageViews
from kvstore.memory.chunks import ChunkPool
from kvstore.memory.memfd import MemfdBackend
from kvstore.memory.page_pool import PagePool
from kvstore.memory.sequence_views import SequenceViews
from services.worker.core.plan import Segment
from services.worker.engine.batch import Placed
from services.worker.engine.kv_reads import PagedReads
from services.worker.engine.make import require_kv_layout
from services.worker.engine.scratch import GrowingScratch
from services.worker.engine.view_reads import ViewReads, shown
from services.worker.model.load import LoadedModel, load_model
from services.worker.model.make import FAMILIES
from tests.services.worker.engine.driving import Driver
from tests.services.worker.engine.test_parity import generate, prompt_of

Checkpoints = Callable[[str], Path]
BLOCKS, CONTEXT_BLOCKS, N_SLOTS = 64, 16, 8
CPU = torch.device("cpu")


@contextmanager
def showing(model: LoadedModel, *, n_slots: int = N_SLOTS) -> Iterator[Driver]:
    """A driver whose pool can be shown, full of what is no number."""
    layout = model.layout
    n_bytes = BLOCKS * layout.layers * layout.page_bytes
    pages = PagePool(ChunkPool(MemfdBackend(n_bytes), n_bytes, layout.page_bytes), layout)
    pages.grow(BLOCKS * layout.layers)
    with (
        closing(pages),
        closing(SequenceViews(pages, n_slots=n_slots, context_blocks=CONTEXT_BLOCKS, lock=threading.Lock())) as views,
    ):
        yield Driver(model, garbage=float("nan"), shown=(pages, views))


def views_of(driver: Driver) -> SequenceViews:
    views = driver.engine._views  # type: ignore[union-attr]  # the engine of a CPU
    assert views is not None
    return views


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_read_through_views_equal_generate(
    family: str, checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gathered(*_: object, **__: object) -> None:
        raise AssertionError("a shown sequence was copied")

    monkeypatch.setattr(PagedReads, "_gather", gathered)
    prompts = [prompt_of(tokens, seed=tokens) for tokens in (1, 15, 33, 90)]
    with showing(load_model(checkpoint(family))) as driver:
        requests = []
        for prompt in prompts:  # all stages of a sequence meet in one step
            requests.append(driver.add(prompt, 9))
            driver.step(32)
        driver.run(32)
        assert [driver.output(request) for request in requests] == generate(checkpoint(family), prompts, 9)


def test_sequences_that_share_pages_read_the_same_memory(checkpoint: Checkpoints) -> None:
    first = prompt_of(40, seed=1)
    second = first[:32] + prompt_of(9, seed=2)
    with showing(load_model(checkpoint("gemma3"))) as driver:
        one = driver.add(first, 12)
        driver.step()
        other = driver.add(second, 12)
        cached = driver.sequences[one].table.blocks(0, 2)
        driver.sequences[other].table.append(cached)
        driver.sequences[other].computed = 32
        driver.run()
        stats = views_of(driver).stats()
        assert [driver.output(one), driver.output(other)] == generate(checkpoint("gemma3"), [first, second], 12)
    own_blocks = 4 + 2 + 4  # 52 tokens; 21 more than the two blocks that are shared, which are mapped for both
    assert stats.mapped_blocks <= own_blocks


def test_a_sequence_without_a_slot_is_read_by_its_table(checkpoint: Checkpoints) -> None:
    prompts = [prompt_of(tokens, seed=tokens) for tokens in (5, 20, 33, 40)]
    with showing(load_model(checkpoint("mistral")), n_slots=2) as driver:
        requests = [driver.add(prompt, 8) for prompt in prompts]
        driver.run(16)
        assert [driver.output(request) for request in requests] == generate(checkpoint("mistral"), prompts, 8)


def test_scratch_to_gather_is_for_one_sequence_where_views_are_read_as_they_are(checkpoint: Checkpoints) -> None:
    model = load_model(checkpoint("mistral"))
    with showing(model, n_slots=2) as driver:
        by_view, by_table = driver.engine.scratch_terms, Driver(model).engine.scratch_terms  # type: ignore[union-attr]
        assert by_view.gathers_bytes(8, 64) == by_view.gathers_bytes(1, 64) < by_table.gathers_bytes(8, 64)


def placed(driver: Driver, requests: Sequence[RequestId]) -> list[Placed]:
    return [Placed(row, driver.segment(request, 1)) for row, request in enumerate(requests)]


@pytest.mark.parametrize("window_tokens", [None, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_holds_the_keys_that_gathering_finds(
    window_tokens: int | None, dtype: torch.dtype, checkpoint: Checkpoints
) -> None:
    with showing(load_model(checkpoint("llama"))) as driver:
        requests = [driver.add(prompt_of(tokens, seed=tokens), 2) for tokens in (35, 47, 20, 40, 45)]
        driver.step()
        decodes, views, scratch = placed(driver, requests), views_of(driver), GrowingScratch(CPU)
        paged = PagedReads(PageViews(driver.pool), dtype, scratch)
        segments: list[Segment] = [one.segment for one in decodes]
        with scratch.frame(), shown(views, segments, driver.layout.block_tokens) as slots:
            groups = ViewReads(views, slots, paged).decode_groups(decodes, window_tokens)
            found: dict[int, torch.Tensor] = {}
            for group in groups:
                read = group.keys_values(1)
                rows = np.arange(len(decodes))[group.rows if isinstance(group.rows, slice) else group.rows.numpy()]
                for place, row in enumerate(rows.tolist()):
                    seen = slice(None) if group.mask is None else group.mask[place] == 0
                    found[row] = read[place][seen].clone()
            for row, one in enumerate(decodes):
                (alone,) = paged.decode_groups([one], window_tokens)
                assert alone.mask is not None
                assert torch.equal(found[row], alone.keys_values(1)[0][alone.mask[0] == 0])
    assert len(groups) == 3, "two neighbours with as many blocks, two others, and one that is shorter"
    assert {read.dtype for read in found.values()} == {dtype}


def test_views_on_another_device_are_refused_with_what_to_take_instead() -> None:
    require_kv_layout("virtual", CPU)
    require_kv_layout("paged", torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"--kv-layout=virtual with --device=cuda: .* take paged"):
        require_kv_layout("virtual", torch.device("cuda"))
