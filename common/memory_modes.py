"""The words of the flags that say how a worker uses its memory. `services.worker.settings` explains them."""

KV_LAYOUTS = ("paged", "virtual")
ELASTIC_MODES = ("off", "static", "kv", "full")
ADMISSION_RULES = ("fcfs", "slo")
SPARE_MEMORY = ("keep", "release")


def parse_layer_offload(text: str) -> str | int:
    """off, auto, or how many layers leave. Raises ValueError."""
    if text in ("off", "auto"):
        return text
    if not text.isdecimal():
        raise ValueError(f"{text!r} is not off, auto or a number of layers")
    return int(text)


def require_memory_modes(
    *, device: str, kv_layout: str, elastic: str, spare_memory: str, block_tokens: int | None
) -> None:
    """Refuse what no worker can do, before anything starts. Raises ValueError."""
    if block_tokens is not None and (block_tokens < 1 or block_tokens % 16):
        raise ValueError(f"--block-tokens={block_tokens}: must be 16, or 16 times a whole number")
    on_cpu = {"kv-layout": (kv_layout, "paged"), "elastic": (elastic, "off"), "spare-memory": (spare_memory, "keep")}
    for flag, (given, elsewhere) in on_cpu.items():
        if given != elsewhere and device != "cpu":
            raise ValueError(f"--{flag}={given} works on a CPU only; with --device={device} it must be {elsewhere}")


def require_host_buffer(*, elastic: str, layer_offload: str | int, host_buffer_bytes: int | None) -> None:
    """Refuse layers that leave for nowhere. Raises ValueError."""
    flag = f"--layer-offload={layer_offload}" if layer_offload not in ("off", 0) else f"--elastic={elastic}"
    if host_buffer_bytes == 0 and (layer_offload not in ("off", 0) or elastic == "full"):
        raise ValueError(f"{flag} needs a host buffer on mixed workers; --host-buffer is 0")
