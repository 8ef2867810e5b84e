"""Norms, rotation, gate, page copies and the choice of tokens: time over the memory floor, and against plain torch.

The floor is the bytes that must be read and written, at the copy bandwidth measured in the same run. Llama-3-8B's shape
in bfloat16. Times are those of a CUDA graph's replay: without the host.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu._attention_inputs import cold_sets, eager_s, graph_s
from benchmarks.gpu.limits import copy_bytes_per_s
from benchmarks.gpu.table import Row, run_and_write
from kernels import reference_ops
from kernels.activation import gated
from kernels.choose import choose_tokens
from kernels.norms import add_rms_norm, rms_norm
from kernels.page_copy import copy_pages, gather_pages
from kernels.rope import rope_write

_HIDDEN, _INTERMEDIATE, _HEADS, _KV_HEADS, _HEAD_DIM, _VOCAB, _BLOCK = 4096, 14336, 32, 8, 128, 128256, 16
_DTYPE = torch.bfloat16
_COPIED_BYTES = 2**29


@dataclass(frozen=True)
class Operator:
    """One way to call ours and torch's on the same data, and the bytes that either has to move."""

    name: str
    n_bytes: int
    ours: Callable[[], object]
    plain: Callable[[], object]


def run(quick: bool) -> list[Row]:
    """All rows."""
    rows: list[Row] = []
    for tokens in (32, 8192) if quick else (1, 32, 512, 8192):
        for make in (_norm, _add_norm, _rotation, _gate):
            rows += _operator_rows([make(tokens) for _ in range(cold_sets(make(tokens).n_bytes))], tokens)
    for page_bytes in (2**12, 2**16) if quick else (2**12, 2**14, 2**15, 2**16):
        rows += _copy_rows(page_bytes)
    for sequences in (1, 128) if quick else (1, 32, 128):
        rows += list(_choice_rows(sequences))
    return rows


def _operator_rows(sets: list[Operator], tokens: int) -> list[Row]:
    one = sets[0]
    ours_s = graph_s([each.ours for each in sets])
    plain_s = graph_s([each.plain for each in sets])
    floor_s = one.n_bytes / copy_bytes_per_s()
    name = f"{one.name}, {tokens} tokens"
    return [
        Row(name, ours_s * 1e6, "us", ours_s / floor_s, "memory floor"),
        Row(f"{name}, plain torch", plain_s * 1e6, "us", plain_s / ours_s, "ours"),
    ]


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=_DTYPE, device="cuda")


def _norm(tokens: int) -> Operator:
    x, weight = _random(tokens, _HIDDEN), _random(_HIDDEN)
    return Operator(
        "RMS norm",
        2 * x.nbytes,
        lambda: rms_norm(x, weight, 1e-5),
        lambda: reference_ops.rms_norm(x, weight, 1e-5),
    )


def _add_norm(tokens: int) -> Operator:
    x, residual, weight = _random(tokens, _HIDDEN) / 64, _random(tokens, _HIDDEN), _random(_HIDDEN)
    return Operator(
        "residual + RMS norm",
        4 * x.nbytes,
        lambda: add_rms_norm(x, residual, weight, 1e-5),
        lambda: reference_ops.rms_norm(residual.add_(x), weight, 1e-5),
    )


def _rotation(tokens: int) -> Operator:
    qkv = _random(tokens, (_HEADS + 2 * _KV_HEADS) * _HEAD_DIM)
    phase = torch.rand(tokens, _HEAD_DIM, device="cuda") * 100
    cos, sin = phase.cos().to(_DTYPE), phase.sin().to(_DTYPE)
    n_pages = -(-tokens // _BLOCK) + 1
    pages = _random(n_pages, _BLOCK, 2, _KV_HEADS, _HEAD_DIM)
    slots = torch.randperm(n_pages * _BLOCK, device="cuda")[:tokens]
    places, within = slots // _BLOCK, slots % _BLOCK

    def plain() -> Tensor:
        query, key, value = qkv.view(tokens, -1, _HEAD_DIM).split((_HEADS, _KV_HEADS, _KV_HEADS), dim=1)
        pages[places, 0, within] = reference_ops.rotate(key, cos, sin)
        pages[places, 1, within] = value
        return reference_ops.rotate(query, cos, sin)

    return Operator(
        "rotation + KV write",
        2 * qkv.nbytes + 2 * cos.nbytes,
        lambda: rope_write(qkv, cos, sin, pages, slots, heads=_HEADS),
        plain,
    )


def _gate(tokens: int) -> Operator:
    gate_up = _random(tokens, 2 * _INTERMEDIATE)
    return Operator(
        "SiLU gate",
        gate_up.nbytes * 3 // 2,
        lambda: gated(gate_up),
        lambda: reference_ops.gated(gate_up, kind="silu"),
    )


def _copy_rows(page_bytes: int) -> list[Row]:
    n_pages = _COPIED_BYTES // page_bytes
    source = _random(n_pages, 2, page_bytes // 4)
    target = torch.empty_like(source)
    read, write = (torch.randperm(n_pages, device="cuda") for _ in range(2))
    few = read[:32]
    out = torch.empty_like(source[:32])
    name = f"pages of {page_bytes // 1024} KiB"

    def row(what: str, call: Callable[[], object]) -> Row:
        rate = 2 * _COPIED_BYTES / graph_s([call])
        return Row(f"{name}, {what}", rate / 1e9, "GB/s", rate / copy_bytes_per_s(), "device copy")

    few_s = graph_s([lambda: gather_pages(source, few, out)] * 16)
    return [
        row("copied at random", lambda: copy_pages(source, read, target, write)),
        row("gathered", lambda: gather_pages(source, read, target)),
        row("gathered by torch", lambda: torch.index_select(source, 0, read, out=target)),
        Row(f"{name}, 32 of them gathered", few_s * 1e6, "us", None, ""),
    ]


def _choice_rows(sequences: int) -> Iterator[Row]:
    """Logits rounded as a bfloat16 head leaves them: thousands of equals."""
    logits = (torch.randn(sequences, _VOCAB, device="cuda") * 3).to(_DTYPE).float()
    chances = torch.rand(sequences, dtype=torch.float64, device="cuda")

    def asked(temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, ...]:
        def column(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full((sequences,), value, dtype=dtype, device="cuda")

        return logits, column(temperature), column(top_k, torch.int32), column(top_p), column(min_p), chances

    name = f"token of {sequences} rows"
    cases = {
        "greedy": asked(0.0, 0, 1.0, 0.0),
        "temperature": asked(1.0, 0, 1.0, 0.0),
        "top-p": asked(0.7, 0, 0.9, 0.0),
        "top-k, top-p, min-p": asked(0.7, 50, 0.9, 0.01),
    }
    for case, arguments in cases.items():
        ours_s = graph_s([partial(choose_tokens, *arguments)])
        sorted_s = eager_s(partial(reference_ops.choose_tokens, *arguments))
        yield Row(f"{name}, {case}", ours_s * 1e6, "us", sorted_s / ours_s, "ours: torch sort over it")


if __name__ == "__main__":
    run_and_write(run, __doc__)
