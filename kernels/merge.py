"""Merging attention over disjoint sets of keys: the reason why every attention kernel can return its log-sum-exp."""

import torch
from torch import Tensor

from kernels.checks import require, require_same_device


def merge_partials(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return (out, lse) as if attention had seen both sets of keys at once.

        lse = ln(e^lse_a + e^lse_b)
        out = out_a * e^(lse_a - lse) + out_b * e^(lse_b - lse)

    out_a, out_b   [tokens, heads, head_dim]   any float dtype, each normalised over its own keys
    lse_a, lse_b   [tokens, heads]             float32, natural log of the sum of e^(scaled score)
    out, lse       same shapes; out has out_a's dtype, lse is float32

    Empty part: lse = -inf, out finite. Two empty parts: out = 0, lse = -inf, never NaN.
    Allocates both results; arguments are only read. Swapping a and b gives the same bits on CPU.
    Raises KernelInputError for a wrong shape, dtype or device.
    Source: online softmax (arXiv 1805.02867).
    """
    require(out_a.dim() == 3, "out_a", f"{out_a.dim()} dimensions", "[tokens, heads, head_dim]")
    require(out_b.shape == out_a.shape, "out_b", tuple(out_b.shape), f"out_a's shape {tuple(out_a.shape)}")
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        require(lse.shape == out_a.shape[:2], name, tuple(lse.shape), f"shape {tuple(out_a.shape[:2])}")
        require(lse.dtype == torch.float32, name, lse.dtype, "float32")
    require_same_device(out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    if out_a.is_cuda:
        from kernels.merge_kernel import merge_on_device  # Triton is there where CUDA is

        return merge_on_device(out_a, lse_a, out_b, lse_b)
    highest = torch.maximum(lse_a, lse_b)
    shift = highest.masked_fill(highest == float("-inf"), 0.0)  # -inf - -inf would be NaN
    weight_a = torch.exp(lse_a - shift)
    weight_b = torch.exp(lse_b - shift)
    total = weight_a + weight_b
    scale = 1.0 / total.masked_fill(total == 0.0, 1.0)
    mixed = out_a.float() * (weight_a * scale)[..., None] + out_b.float() * (weight_b * scale)[..., None]
    return mixed.to(out_a.dtype), shift + torch.log(total)
