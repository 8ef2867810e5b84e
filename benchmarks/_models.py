"""Random-weight models of sizes that `penstock model make` does not have, in the same real format."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from services.worker.model.make import make_model

SMALL_LLAMA = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
}
"""Large enough that computing a document outweighs HTTP and messages, small enough for two cores."""


def make_small_llama(folder: Path) -> Path:
    """The tiny model's tokenizer around a larger body, float32, seed 0."""
    make_model("tiny", folder, family="llama", dtype="float32")
    config = AutoConfig.from_pretrained(folder)
    for name, value in SMALL_LLAMA.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder
