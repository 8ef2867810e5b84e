"""What steps in flight read of the slots of sequence views. Pure.

A step reads what was shown for it: `show` comes before `begin_step` (the step is planned, then starts) or right after it.
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
    """Owns which leading blocks of which slots are read: by steps in flight, and by the one that is planned."""

    def __init__(self) -> None:
        self._steps: deque[_Step] = deque()
        self._planned: dict[int, tuple[Hashable, int]] = {}
        self.begun = 0
        """Steps that began so far."""

    @property
    def in_flight(self) -> int:
        """Steps that began and did not end."""
        return len(self._steps)

    def awaits(self, owner: Hashable) -> bool:
        """Whether a step that began computes this owner and was shown nothing of it yet."""
        return any(owner in step.awaited for step in self._steps)

    def read_blocks(self, slot: int) -> int:
        """Leading blocks of a slot that must stay as they are; 0: nobody reads it."""
        _, planned = self._planned.get(slot, (None, 0))
        return max(self.read_in_flight(slot), planned)

    def read_in_flight(self, slot: int) -> int:
        """Those of them that a step reads that has begun."""
        return max((step.read_blocks.get(slot, 0) for step in self._steps), default=0)

    def unplan(self, slot: int) -> None:
        """The step that is planned does not read this slot after all."""
        self._planned.pop(slot, None)

    def clear(self) -> None:
        """No step reads anything."""
        self._steps.clear()
        self._planned.clear()

    def shown(self, slot: int, owner: Hashable, n_blocks: int) -> None:
        """A step was given `n_blocks` blocks of this slot: one that began and awaits the owner, else the next one."""
        step = next((step for step in self._steps if owner in step.awaited), None)
        if step is None:
            _, before = self._planned.get(slot, (owner, 0))
            self._planned[slot] = (owner, max(before, n_blocks))
        else:
            step.awaited.discard(owner)
            step.read_blocks[slot] = n_blocks

    def begin(self, owners: Iterable[Hashable]) -> None:
        """A step of these owners begins. What was shown for others meanwhile is read by nobody."""
        awaited = set(owners)
        step = _Step(awaited)
        for slot, (owner, n_blocks) in self._planned.items():
            if owner in awaited:
                step.read_blocks[slot] = n_blocks
        awaited -= {owner for owner, _ in self._planned.values()}
        self._planned.clear()
        self._steps.append(step)
        self.begun += 1

    def end(self) -> None:
        """The oldest step in flight has ended, kernels included. Raises VmMisuse if there is none."""
        if not self._steps:
            raise VmMisuse("a step ended that did not begin")
        self._steps.popleft()
