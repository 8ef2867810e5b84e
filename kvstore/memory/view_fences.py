"""What steps in flight read of the slots of sequence views. Pure.

A step begins, and then it is shown what it reads.
"""

from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from kvstore.memory.backend import VmMisuse


@dataclass(slots=True)
class _Step:
    awaited: set[Hashable]
    """Owners that it computes and that were shown nothing for it yet."""
    read_blocks: dict[int, int] = field(default_factory=dict)
    """Slot -> leading blocks that it reads."""


class StepFences:
    """Owns which leading blocks of which slots steps in flight read."""

    def __init__(self) -> None:
        self._steps: deque[_Step] = deque()
        self.begun = 0
        """Steps that began so far."""

    def awaits(self, owner: Hashable) -> bool:
        """Whether a step that began computes this owner and was shown nothing of it yet."""
        return any(owner in step.awaited for step in self._steps)

    def read_blocks(self, slot: int) -> int:
        """Leading blocks of a slot that must stay as they are; 0: nobody reads it."""
        return max((step.read_blocks.get(slot, 0) for step in self._steps), default=0)

    def clear(self) -> None:
        """No step reads anything."""
        self._steps.clear()

    def require_awaited(self, owner: Hashable) -> None:
        """Raise VmMisuse unless a step that began computes this owner and was shown nothing of it yet."""
        if not self.awaits(owner):
            raise VmMisuse(f"{owner!r} is shown outside of a step that computes it, or a second time in one")

    def shown(self, slot: int, owner: Hashable, n_blocks: int) -> None:
        """The newest step that awaits the owner was given `n_blocks` blocks of this slot. Raises VmMisuse if none does."""
        self.require_awaited(owner)
        step = next(step for step in reversed(self._steps) if owner in step.awaited)
        step.awaited.discard(owner)
        step.read_blocks[slot] = n_blocks

    def begin(self, owners: Iterable[Hashable]) -> None:
        """A step of these owners begins."""
        self._steps.append(_Step(set(owners)))
        self.begun += 1

    def end(self) -> None:
        """The oldest step in flight has ended, kernels included. Raises VmMisuse if there is none."""
        if not self._steps:
            raise VmMisuse("a step ended that did not begin")
        self._steps.popleft()
