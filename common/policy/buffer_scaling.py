"""How much of the host buffer may be used, by which promise is being broken. Pure.

KV in the host buffer lets prompts start early (better TTFT) and makes answers wait for their KV (worse TPOT). So the buffer has
a logical size, which bounds what is let in and throws nothing out.
Source: eLLM (arXiv 2506.15155), SLO-aware buffer scaling; the factor both ways, the floor, the start at full size, TPOT before
TTFT and the cleared window are our reading of it.
"""

import math
from collections import deque


class BufferScaling:
    """Owns the logical size and the window of the last steps' misses."""

    def __init__(
        self, *, least_bytes: int, physical_bytes: int, alpha: float = 2.0, misses: int = 3, window_steps: int = 5
    ) -> None:
        """`misses` of one kind in the last `window_steps` steps change the size by the factor `alpha`. Raises ValueError."""
        if not 1 <= least_bytes <= physical_bytes:
            raise ValueError(f"least_bytes={least_bytes}: must be 1 to physical_bytes={physical_bytes}")
        if not 1.0 < alpha < float("inf"):
            raise ValueError(f"alpha={alpha}: must be above 1, and finite")
        if not 1 <= misses <= window_steps:
            raise ValueError(f"misses={misses}: must be 1 to window_steps={window_steps}")
        self._least_bytes, self._physical_bytes, self._alpha = least_bytes, physical_bytes, alpha
        self._misses = misses
        self._window: deque[tuple[bool, bool]] = deque(maxlen=window_steps)
        self.logical_bytes = physical_bytes
        """To read."""

    def after_step(self, ttft_missed: bool, tpot_missed: bool) -> int:
        """A step ended in which these promises were broken, or not. The logical size from now on, bytes."""
        self._window.append((ttft_missed, tpot_missed))
        late_firsts, late_others = (sum(kind) for kind in zip(*self._window, strict=True))
        if late_others >= self._misses:
            self._change(max(self._least_bytes, math.floor(self.logical_bytes / self._alpha)))
        elif late_firsts >= self._misses:
            self._change(min(self._physical_bytes, math.ceil(self.logical_bytes * self._alpha)))
        return self.logical_bytes

    def _change(self, n_bytes: int) -> None:
        if n_bytes != self.logical_bytes:  # at a limit nothing was tried whose effect should be awaited
            self.logical_bytes = n_bytes
            self._window.clear()
