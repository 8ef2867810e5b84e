"""Which ways KV may be told to take, by the device of those who tell."""


def require_transport(transport: str, device: str) -> None:
    """Raise ValueError if KV of a worker on `device` cannot go this way to anybody."""
    if transport == "cuda_ipc" and device == "cpu":
        raise ValueError("--transport=cuda_ipc: goes between GPUs; use --device cuda, or --transport auto")
