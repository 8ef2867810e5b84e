"""The shape of one KV page, and which two layouts may exchange pages."""

from dataclasses import dataclass

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """A page holds K and V of one layer for `block_tokens` tokens: [block_tokens, 2, kv_heads, head_dim]."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    block_tokens: int = 16

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, K and V together."""
        return 2 * self.block_tokens * self.kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    def blocks_for(self, tokens: int) -> int:
        """Token blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_tokens)

    def pages_for(self, tokens: int) -> int:
        """Pages over all layers that hold `tokens` tokens."""
        return self.blocks_for(tokens) * self.layers

    def pages_at_most(self, prompt_tokens: int, max_tokens: int) -> int:
        """Pages of a sequence at its longest: the last drawn token needs none."""
        return self.pages_for(prompt_tokens + max_tokens - 1)
