"""Random-weight checkpoints in the real Hugging Face format: what `penstock model make` writes.

The same preset, family, dtype and seed give the same weights everywhere. Norm weights and biases are random too, so
that code which forgets one of them gives other tokens.
"""

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any  # Any: keyword arguments of transformers' config classes

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from common.errors import ConfigError
from services.worker.model.make_tokenizer import BOS, EOS, PAD, TURN_END, make_tokenizer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SMALL_SPREAD = 0.1
"""Standard deviation of what is added to norm weights and biases."""


@dataclass(frozen=True, slots=True)
class Preset:
    """Sizes of a checkpoint."""

    shape: Mapping[str, Any]
    vocab_tokens: int
    context_tokens: int
    weight_spread: float
    """Standard deviation of matrices; large enough that the answer depends on all of the context."""
    embedding_spread: float
    """Of the embedding; so small beside the layers' part that a tied model does not just repeat its input."""
    dtype: str


PRESETS = {
    "tiny": Preset(
        shape={
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        vocab_tokens=1536,
        context_tokens=2048,
        weight_spread=0.15,
        embedding_spread=0.04,
        dtype="float32",
    ),
    "mini": Preset(
        shape={
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
        },
        vocab_tokens=1536,
        context_tokens=8192,
        weight_spread=0.08,
        embedding_spread=0.04,
        dtype="float32",
    ),
    "deep": Preset(
        shape={
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 32,
        },
        vocab_tokens=1536,
        context_tokens=16_384,
        weight_spread=0.1,
        embedding_spread=0.04,
        dtype="float32",
    ),
    "small": Preset(
        shape={
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        vocab_tokens=32_000,
        context_tokens=32_768,
        weight_spread=0.04,
        embedding_spread=0.02,
        dtype="bfloat16",
    ),
}
_TINY_FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 32},
    "mistral": {"tie_word_embeddings": False, "head_dim": 16, "sliding_window": 48},
    "gemma3": {
        "tie_word_embeddings": True,
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
FAMILIES = tuple(_TINY_FAMILIES)
_PRESET_FAMILIES = {"tiny": FAMILIES, "mini": ("llama", "qwen2"), "deep": ("llama",), "small": ("qwen2",)}
_PRESET_HELP = (
    "tiny: for tests; mini: computing outweighs HTTP, and two cores suffice; deep: layers and KV outweigh computing; "
    "small: 0.5B shape"
)
_MODEL_TYPES = {"gemma3": "gemma3_text"}


def make_model(
    preset: str, out_dir: Path | str, *, family: str | None = None, dtype: str | None = None, seed: int = 0
) -> Path:
    """Write config, weights, tokenizer, chat template and generation config to `out_dir`, which must not exist yet.

    `family` None takes qwen2, or what the preset has instead; `dtype` None the preset's own. The folder appears whole or not at all.
    Raises ConfigError for an unknown name or an `out_dir` that is in use.
    """
    if preset not in PRESETS:
        raise ConfigError(f"--preset={preset!r}: must be {' or '.join(PRESETS)}")
    allowed = _PRESET_FAMILIES[preset]
    family = family or ("qwen2" if "qwen2" in allowed else allowed[0])
    if family not in allowed:
        raise ConfigError(f"--family={family!r}: with --preset {preset} must be {' or '.join(allowed)}")
    sizes = PRESETS[preset]
    if (dtype or sizes.dtype) not in _DTYPES:
        raise ConfigError(f"--dtype={dtype!r}: must be {' or '.join(_DTYPES)}")
    out = Path(out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out={out}: is already there; name a folder that does not exist or is empty")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write(partial, sizes, family, _DTYPES[dtype or sizes.dtype], seed)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _write(folder: Path, sizes: Preset, family: str, dtype: torch.dtype, seed: int) -> None:
    tokenizer = make_tokenizer(sizes.vocab_tokens, sizes.context_tokens)
    pad, bos, eos, turn_end = tokenizer.convert_tokens_to_ids([PAD, BOS, EOS, TURN_END])
    family_shape = _TINY_FAMILIES[family] if sizes is PRESETS["tiny"] else {}
    config = AutoConfig.for_model(
        _MODEL_TYPES.get(family, family),
        **{**sizes.shape, **family_shape},
        vocab_size=sizes.vocab_tokens,
        max_position_embeddings=sizes.context_tokens,
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=[eos, turn_end],
    )
    model = _random_model(config, dtype, sizes, seed)
    model.generation_config = GenerationConfig(
        do_sample=False, pad_token_id=pad, bos_token_id=bos, eos_token_id=[eos, turn_end]
    )
    disable_progress_bar()  # of "shards": one line of noise in the log of whoever makes a model at start
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes 0600, which a service under another user cannot read


def _random_model(config: PreTrainedConfig, dtype: torch.dtype, sizes: Preset, seed: int) -> PreTrainedModel:
    """A model whose parameters come from `seed` alone. Its buffers are not filled: checkpoints do not hold them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    centre = 0.0 if config.model_type.startswith("gemma") else 1.0  # gemma's norms multiply by 1 + weight
    model = model.to_empty(device="cpu")
    model.tie_weights()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                spread = sizes.embedding_spread if "embed" in name else sizes.weight_spread
                parameter.copy_(drawn * spread)
            else:
                parameter.copy_(drawn * _SMALL_SPREAD + (centre if name.endswith("norm.weight") else 0.0))
    return model


def main(argv: Sequence[str]) -> int:
    """The command `penstock model make`: returns the exit code, 2 for a bad argument."""
    parser = argparse.ArgumentParser(
        prog="penstock model make", description="Write a random-weight checkpoint with tokenizer and chat template."
    )
    parser.add_argument("--preset", required=True, choices=tuple(PRESETS), help=_PRESET_HELP)
    parser.add_argument("--out", required=True, type=Path, help="folder to write; must not exist or be empty")
    parser.add_argument("--family", choices=FAMILIES, help="architecture (default: qwen2; deep: llama)")
    parser.add_argument("--dtype", default=None, choices=tuple(_DTYPES), help="of the weights; default: the preset's")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: %(default)s)")
    options = parser.parse_args(argv)
    try:
        out = make_model(options.preset, options.out, family=options.family, dtype=options.dtype, seed=options.seed)
    except ConfigError as error:
        sys.stderr.write(f"penstock model make: {error}\n")
        return 2
    weights_bytes = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    sys.stdout.write(f"{out}: {options.preset}, {weights_bytes / 2**20:.1f} MiB of weights\n")
    return 0
