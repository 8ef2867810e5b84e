"""Models of real shapes with random weights, made on the GPU itself: no checkpoint is written or read."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from common.kv_layout import KvLayout
from common.messages.liveness import ModelIdentity
from services.worker.model.fused import FusedDecoder, FusedLayer, norm_terms
from services.worker.model.load import LoadedModel

_SPREAD = 0.02

LLAMA_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131_072,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    tie_word_embeddings=False,
)


def random_llama(config: LlamaConfig, device: torch.device, context_tokens: int) -> LoadedModel:
    """As `load_model` would give it, in bfloat16."""
    dtype = torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)

    def weights(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, _SPREAD)

    head_dim = config.hidden_size // config.num_attention_heads
    rotary = model.get_submodule("model.rotary_emb")
    with torch.device(device):
        model.set_submodule("model.rotary_emb", type(rotary)(config=config))
    model.get_submodule("model.embed_tokens").weight = torch.nn.Parameter(
        weights(config.vocab_size, config.hidden_size), requires_grad=False
    )
    ones = torch.ones(config.hidden_size, dtype=dtype, device=device)
    model.get_submodule("model.norm").weight = torch.nn.Parameter(ones, requires_grad=False)
    kv_rows = 2 * config.num_key_value_heads * head_dim
    layers = [
        FusedLayer(
            index=index,
            qkv=weights(config.hidden_size + kv_rows, config.hidden_size),
            qkv_bias=None,
            out=weights(config.hidden_size, config.hidden_size),
            out_bias=None,
            gate_up=weights(2 * config.intermediate_size, config.hidden_size),
            gate_up_bias=None,
            down=weights(config.hidden_size, config.intermediate_size),
            down_bias=None,
            before_attention=ones,
            after_attention=None,
            before_mlp=ones,
            after_mlp=None,
            query_norm=None,
            key_norm=None,
            heads=config.num_attention_heads,
            scaling=head_dim**-0.5,
            window_tokens=None,
            rotary_type=None,
        )
        for index in range(config.num_hidden_layers)
    ]
    decoder = FusedDecoder(model, layers, weights(config.vocab_size, config.hidden_size), norm_terms(config))
    layout = KvLayout(
        layers=config.num_hidden_layers,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        dtype="bfloat16",
        block_tokens=16,
    )
    identity = ModelIdentity(
        name="random-llama",
        fingerprint="0" * 32,
        architecture="LlamaForCausalLM",
        dtype="bfloat16",
        layers=layout.layers,
        kv_heads=layout.kv_heads,
        head_dim=layout.head_dim,
        block_tokens=layout.block_tokens,
        vocab_tokens=config.vocab_size,
        context_tokens=context_tokens,
    )
    return LoadedModel(
        identity=identity,
        layout=layout,
        runner=decoder,
        device=device,
        dtype=dtype,
        compute_dtype=dtype,
        weight_bytes=decoder.weight_bytes,
    )
