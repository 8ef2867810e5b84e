"""Starting a kernel while the one before it ends: on the devices that can, launch costs overlap.

A kernel launched with `early_start(device)` may begin before its predecessor in the stream has ended. Every one of its
programs must say `wait_for_inputs(EARLY)` before it touches memory or returns, and then sees everything that was queued
before it: the predecessor has ended, and so, by the same rule, had what came before that. A kernel launched without it
waits for its predecessor's full end, so both kinds may follow one another. In a CUDA graph this becomes part of the graph.
Source: CUDA programming guide, "Programmatic Dependent Launch and Synchronization"; compute capability 9.0 and above.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_FIRST_CAPABILITY = (9, 0)


@functools.cache
def can_start_early(device: torch.device) -> bool:
    """Whether kernels on `device` may begin before their predecessors end."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FIRST_CAPABILITY


def early_start(device: torch.device) -> dict[str, bool]:
    """Keywords of such a launch: the kernel's constant EARLY, and the launch option that goes with it."""
    early = can_start_early(device)
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


@triton.jit
def wait_for_inputs(EARLY: tl.constexpr) -> None:
    """Return when all that was queued before this kernel is there."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
