"""Options of torch that hold for a whole process; set once, by the process's start."""

import os

import torch


def configure_torch(threads: int | None = None) -> int:
    """Set the number of compute threads, and nothing that changes results. None: all cores this process may use.

    Returns the number of threads. Call it before the first tensor operation.
    """
    chosen = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(chosen)
    torch.set_grad_enabled(False)
    return chosen
