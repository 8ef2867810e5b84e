"""The words of the flags that say how a worker uses its memory. `services.worker.settings` explains them."""

KV_LAYOUTS = ("paged", "virtual")
ELASTIC_MODES = ("off", "static", "kv", "full")
ADMISSION_RULES = ("fcfs", "slo")
SPARE_MEMORY = ("keep", "release")


def parse_layer_offload(text: str) -> str | int:
    """off, auto, or how many layers leave. Raises ValueError."""
    return text if text in ("off", "auto") else int(text)
