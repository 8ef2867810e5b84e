"""Which KV a store can keep: that of the model it learned first, and of all models whose KV lies alike. Pure; owns nothing."""

from common.kv_layout import DTYPE_BYTES, KvLayout
from common.messages.liveness import ModelIdentity

_FIELDS = ("layers", "kv_heads", "head_dim", "dtype", "block_tokens")


def layout_of(model: ModelIdentity) -> KvLayout | str:
    """How KV of the model lies, or why that cannot be known."""
    if model.dtype not in DTYPE_BYTES:
        return f"does not know how long a {model.dtype!r} is"
    if min(model.layers, model.kv_heads, model.head_dim, model.block_tokens) < 1:
        return f"cannot keep blocks of {model.layers} layers with {model.kv_heads} heads"
    return KvLayout(**{name: getattr(model, name) for name in _FIELDS})


def difference(mine: KvLayout, theirs: ModelIdentity) -> str:
    """In what KV of the model lies otherwise, for people; empty if it lies alike."""
    return "; ".join(
        f"{name}: {getattr(mine, name)!r} here, {getattr(theirs, name)!r} there"
        for name in _FIELDS
        if getattr(mine, name) != getattr(theirs, name)
    )
