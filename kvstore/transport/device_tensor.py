"""Tensors over addresses that torch did not allocate."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PinnedRows:
    """Pages [page, page_bytes] in host memory that the device may use, as both sides see them. On a CPU one is the other."""

    host: Tensor
    device: Tensor


def bytes_at(address: int, n_bytes: int, device: torch.device) -> Tensor:
    """The bytes from `address` on, not copied, as memory of `device`; the caller keeps them there while it is used.

    For host memory that is pinned, `device` may be the accelerator: addresses are the same on both sides.
    """
    empty = torch.empty(0, dtype=torch.uint8, device=device)
    if n_bytes == 0:
        return empty
    # torch has no public way to wrap addresses that are mapped only in part: this one asks the driver nothing.
    storage = torch._C._construct_storage_from_data_pointer(address, device, n_bytes)
    return empty.set_(storage, 0, (n_bytes,), (1,))


def pinned_rows(host: Tensor, device: torch.device) -> PinnedRows:
    """Pinned pages as `device` sees them. `host` [page, page_bytes], contiguous, stays the caller's."""
    return PinnedRows(host, bytes_at(host.data_ptr(), host.numel(), device).view(host.shape))
