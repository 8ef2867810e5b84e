"""Which models run exactly, that is, token for token as `transformers` runs them. Everything else is refused by name."""

from collections.abc import Mapping
from typing import Any  # Any: values of a model's config.json

from transformers import PreTrainedConfig

from common.errors import ConfigError

ARCHITECTURES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
"""`model_type` of the config -> the one architecture of that type that generates text."""

_LAYER_TYPES = ("full_attention", "sliding_attention")
_POSITION_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Rotary variants whose angles depend on the longest sequence of the batch, so on a request's neighbours."""


def require_exact(config: PreTrainedConfig) -> str:
    """The architecture's name, if this config runs exactly. Raises ConfigError naming what does not, and what would."""
    model_type = require_known(str(config.model_type))
    expected = ARCHITECTURES[model_type]
    named = list(getattr(config, "architectures", None) or [expected])
    if named != [expected]:
        raise ConfigError(f"architectures {named} cannot be served; with model_type {model_type} it must be {expected}")
    for reason in _reasons_against(config):
        raise ConfigError(f"this {expected} cannot be served exactly: {reason}")
    return expected


def require_known(model_type: str) -> str:
    """`model_type` itself, if it is one of ours. Raises ConfigError."""
    if model_type not in ARCHITECTURES:
        raise ConfigError(f"model_type {model_type!r} cannot be served; allowed are {', '.join(ARCHITECTURES)}")
    return model_type


def _reasons_against(config: PreTrainedConfig) -> list[str]:
    reasons: list[str] = []

    def value(name: str) -> Any:
        return getattr(config, name, None)

    if value("quantization_config") is not None:
        reasons.append("the checkpoint is quantised; use one in float32 or bfloat16")
    if value("auto_map"):
        reasons.append("it brings code of its own (auto_map); use a checkpoint of the library's own architecture")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if value(name) is not None:
            reasons.append(f"{name} is {value(name)}; it must be null")
    if value("use_bidirectional_attention"):
        reasons.append("use_bidirectional_attention is true; only causal attention can be cached")
    unknown = sorted(set(value("layer_types") or ()) - set(_LAYER_TYPES))
    if unknown:
        reasons.append(f"layer_types contains {', '.join(unknown)}; allowed are {', '.join(_LAYER_TYPES)}")
    reasons += [
        f"rope_type {rope_type!r} depends on the other sequences of a batch; it must be default, linear, yarn or llama3"
        for rope_type in _rope_types(config)
        if rope_type in _POSITION_DEPENDENT_ROPE
    ]
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        reasons.append(f"{heads} attention heads do not divide over {kv_heads} key-value heads")
    return reasons


def _rope_types(config: PreTrainedConfig) -> list[str]:
    """Rope types of all layer types: newer configs hold one set of parameters per layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    sets = [one for one in parameters.values() if isinstance(one, Mapping)] or [parameters]
    return [str(one.get("rope_type", "default")) for one in sets]
