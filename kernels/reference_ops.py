"""What the kernels around attention mean, in plain torch. Slow; tests compare every implementation with this file.

Norms, rotation and activation round where the layer code of transformers does: after every operator.
"""

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, offset: float = 0.0) -> Tensor:
    """LlamaRMSNorm, or with an offset Gemma3RMSNorm, over the last dimension."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    if offset:
        return (normed * (offset + weight.float())).to(x.dtype)
    return weight.to(x.dtype) * normed.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """apply_rotary_pos_emb: x [tokens, heads, head_dim], cos and sin [tokens, head_dim]."""
    low, high = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    return (x * cos) + (torch.cat((-high, low), dim=-1) * sin)


def write_pages(pages: Tensor, slots: Tensor, key: Tensor, value: Tensor, *, page_shift: int = 0) -> None:
    """Set K and V [tokens, kv_heads, head_dim] in pages [pages, block_tokens, 2, kv_heads, head_dim], in place."""
    block_tokens = pages.shape[1]
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            page, place = divmod(slot, block_tokens)
            pages[page + page_shift, place, 0] = key[row].to(pages.dtype)
            pages[page + page_shift, place, 1] = value[row].to(pages.dtype)


def gated(gate_up: Tensor, *, kind: str) -> Tensor:
    """The MLPs' activation(gate) * up of [tokens, 2 * n]: gates, then ups."""
    gate, up = gate_up.chunk(2, dim=-1)
    active = functional.silu(gate) if kind == "silu" else functional.gelu(gate, approximate="tanh")
    return active * up


def copy_pages(source: Tensor, source_ids: Tensor, target: Tensor, target_ids: Tensor) -> None:
    """Whole pages from one tensor [pages, ...] to another, in place."""
    target[target_ids.long()] = source[source_ids.long()]


def choose_tokens(
    logits: Tensor, temperatures: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, chances: Tensor
) -> Tensor:
    """The token of each row of logits [rows, vocab], by sorting all of them. See `kernels.choose.choose_tokens`."""
    largest = torch.finfo(torch.float32).max
    usable = torch.nan_to_num(logits.float(), nan=-torch.inf, posinf=largest, neginf=-torch.inf)
    likeliest = usable.max(dim=-1, keepdim=True).values.clamp_(min=-largest)
    distances = (likeliest - usable) / temperatures.float()[:, None].clamp(min=1e-5)
    ordered, ids = distances.sort(dim=-1, stable=True)
    reached = torch.exp(-ordered).double().cumsum(dim=-1)
    vocab = logits.shape[1]
    kept = (-ordered >= min_p.double().log().float()[:, None]).sum(dim=-1).clamp_(min=1)
    kept = torch.minimum(kept, torch.where(top_k > 0, top_k.long(), vocab))
    mass = reached.gather(1, (kept - 1)[:, None])
    mass = torch.where(
        top_p[:, None] < 1.0, reached.gather(1, _first(reached, top_p.double()[:, None] * mass, right=False)), mass
    )
    place = torch.minimum(_first(reached, chances[:, None] * mass, right=True), _first(reached, mass, right=False))
    drawn = ids.gather(1, place)[:, 0]
    nothing = reached[:, -1] == 0.0
    return torch.where((temperatures < 1e-5) | nothing, usable.argmax(dim=-1), drawn)


def _first(reached: Tensor, mass: Tensor, *, right: bool) -> Tensor:
    return torch.searchsorted(reached, mass.contiguous(), right=right).clamp_(max=reached.shape[1] - 1)
