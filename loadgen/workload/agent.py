"""`agent`: loops in the shape of ReAct. Pure.

A long prompt of tools and worked examples that many loops share, a short task, then steps: the model writes a thought
and an action, a tool runs for a moment, its observation is appended, and the model goes on. Source of the shape: Yao et
al., ReAct (arXiv 2210.03629), as MemServe (arXiv 2406.17565) uses it on HotpotQA.
"""

from dataclasses import dataclass
from random import Random

from loadgen.workload.dialogue import Dialogue
from loadgen.workload.lengths import LengthLaw
from loadgen.workload.plan import Conversation
from loadgen.workload.popularity import draw_group


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    """One conversation is one task: its turns are the task and then the observations, its pauses are the tools' times."""

    seed: int | str
    dialogue: Dialogue
    tools_lengths: LengthLaw
    """Length of the shared opening."""
    n_tool_sets: int = 1
    zipf: float = 0.0

    @property
    def n_conversations(self) -> None:
        """Endless."""
        return None

    def conversation(self, index: int) -> Conversation:
        """The loop at that place."""
        place = draw_group(Random(f"{self.seed}/tools/of/{index}"), self.n_tool_sets, self.zipf)
        name = f"{self.seed}/tools/{place}"
        opening = self.dialogue.source.shared(name, self.tools_lengths.draw_tokens(Random(f"{name}/length")))
        return Conversation(index=index, opening=opening, turns=self.dialogue.turns(f"{self.seed}/task/{index}"))
