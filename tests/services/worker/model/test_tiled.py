"""The tiled decoder computes what `transformers`' own layers compute, however many tiles the rows are cut into."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from services.worker.engine.scratch import GrowingScratch
from services.worker.model.load import load_model
from services.worker.model.make import FAMILIES
from services.worker.model.packing import LinearPath
from services.worker.model.tiled import TiledDecoder

ROWS = 600


class Causal:
    """Attention of one sequence from its first token on, as transformers' own `sdpa` calls torch."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        window_tokens: int | None,
        out: Tensor | None = None,
    ) -> Tensor:
        assert out is not None
        behind = torch.arange(len(query))[:, None] - torch.arange(len(query))[None]
        seen = (behind >= 0) & (behind < (window_tokens or len(query)))
        wide = [one.transpose(0, 1).repeat_interleave(query.shape[1] // one.shape[1], dim=0) for one in (key, value)]
        found = scaled_dot_product_attention(
            query.transpose(0, 1)[None], *(one[None] for one in wide), seen[None], scale=scaling
        )
        return out.copy_(found[0].transpose(0, 1))


@pytest.mark.long
@pytest.mark.parametrize("path", [LinearPath.PLAIN, LinearPath.PACKED])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_prompt_of_several_tiles_are_those_of_transformers(
    family: str, path: LinearPath, checkpoint: Callable[[str], Path]
) -> None:
    decoder = load_model(checkpoint(family), path=path).runner
    assert isinstance(decoder, TiledDecoder)
    ids = torch.arange(5, 5 + ROWS)
    reference = AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = reference(ids[None]).logits[0]
        found = decoder.logits(decoder.run(ids, torch.arange(ROWS), Causal(), GrowingScratch(torch.device("cpu"))))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
