"""What plain transformers answers: the oracle of every parity test."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


class Reference:
    """A float32 model of transformers with its own cache and attention, greedy, one prompt at a time."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.eval()

    def generate(self, prompt: Sequence[int], n_tokens: int) -> list[int]:
        """Exactly `n_tokens` tokens; end-of-sequence ids do not end it."""
        with torch.inference_mode():
            out = self.model.generate(
                torch.tensor([list(prompt)]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=n_tokens,
                min_new_tokens=n_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return out[0, len(prompt) :].tolist()
