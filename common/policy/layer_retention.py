"""How many layers of a prompt's KV stay on the device while it is computed, and which. Pure.

Source: LayerKV (arXiv 2410.00428), equations 3 and 4 (how many) and its example of alternating layers (which).
"""

from fractions import Fraction


def retained_layers(layers: int, prefill_ms: float, layer_bytes: int, bytes_per_s: float | None) -> int:
    """The fewest layers x, of `layers`, whose KV must stay so that copying out the others takes no longer than the prompt.

        x = max(0, layers - floor(prefill_ms / 1000 * bytes_per_s / layer_bytes))

    which is the smallest x in 0..layers with (layers - x) * layer_bytes / bytes_per_s <= prefill_ms / 1000.
    `prefill_ms`: to compute this prompt alone. `layer_bytes`: its KV in one layer. `bytes_per_s`: of the link, as measured;
    None: not known, so that nothing may leave. Raises ValueError for numbers that are no amounts.
    """
    if layers < 0 or layer_bytes < 1:
        raise ValueError(f"{layers} layers of {layer_bytes} bytes: must be 0 or more, of 1 byte or more")
    if not 0 <= prefill_ms < float("inf"):
        raise ValueError(f"prefill_ms={prefill_ms}: must be 0 or more, and finite")
    if bytes_per_s is None:
        return layers
    if not 0 <= bytes_per_s < float("inf"):
        raise ValueError(f"bytes_per_s={bytes_per_s}: must be 0 or more, and finite; None if it is not known")
    hidden = Fraction(prefill_ms) * Fraction(bytes_per_s) // (1000 * layer_bytes)  # exact: a border is not rounded over
    return max(0, layers - hidden)


def offloaded(layers: int, n_offloaded: int) -> tuple[int, ...]:
    """Which `n_offloaded` of the layers leave: one of each of n equal groups, and of each group the first.

    So copies are spread over the pass, and each has as much of the pass left to hide behind as it can have.
    Raises ValueError if there are not so many layers.
    """
    if not 0 <= n_offloaded <= layers:
        raise ValueError(f"{n_offloaded} layers of {layers} cannot leave: must be 0 to {layers}")
    return tuple(number * layers // n_offloaded for number in range(n_offloaded))
