"""Clients that leave: some turns of any workload are cut short after a number of tokens. Pure."""

from dataclasses import dataclass, replace
from random import Random

from loadgen.workload.plan import Conversation, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class WithCancels:
    """Another workload, of whose turns a share `rate` is left after 0 to length - 1 tokens, evenly.

    Both numbers are drawn for every turn, so that the same turns stay cancelled when lengths change, and more of them
    when the rate grows. Turns that the workload itself cancels stay as they are.
    """

    workload: Workload
    seed: int | str
    rate: float

    @property
    def n_conversations(self) -> int | None:
        """As many as the other has."""
        return self.workload.n_conversations

    def conversation(self, index: int) -> Conversation:
        """The other's conversation. Raises IndexError beyond the last."""
        planned = self.workload.conversation(index)
        random = Random(f"{self.seed}/cancels/{index}")
        turns = []
        for turn in planned.turns:
            cancelled, point = random.random() < self.rate, random.random()
            if cancelled and turn.cancel_after_tokens is None:
                turn = replace(turn, cancel_after_tokens=int(point * turn.output_tokens))
            turns.append(turn)
        return replace(planned, turns=tuple(turns))
