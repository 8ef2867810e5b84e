"""The cells of the kill matrix, as values: who fails, in which phase of a request, how, and what its client may get then.

A phase is where a process stands still when the deed is done: by a `stop` rule of the fault kit at the point of that name. In a
cell whose victim has a part in the phase the victim is the one that stands there; in others somebody else does, and goes on
when the victim is gone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

VICTIMS = ("gateway", "prefill", "decode", "kvstore", "redis")


class Mode(StrEnum):
    """What happens to the victim."""

    KILL = "kill"
    """kill -9; it is started again when the client has its answer."""
    STOP = "stop"
    """SIGSTOP until everybody takes it for dead, then SIGCONT."""
    PAUSE = "pause"
    """SIGSTOP for less than the silence limit."""
    CUT = "cut"
    """Off the network until everybody takes it for dead; it runs on, and what it shares memory with it can still write."""


class Asking(StrEnum):
    """What the request of a cell is like."""

    FRESH = "fresh"
    """Nobody knows its prompt."""
    STORED = "stored"
    """The KV store has its prompt, the prefill worker does not."""
    LEFT = "left"
    """Its client leaves in the middle of the answer."""


class Got(StrEnum):
    """What a client can get."""

    ANSWER = "answer"
    """Every token that transformers gives."""
    ERROR = "error"
    """An error that names a phase, perhaps after right tokens."""
    BROKEN = "broken"
    """The connection ended without a last word, perhaps after right tokens."""
    LEFT = "left"
    """It left itself."""
    WRONG = "wrong"
    """Anything else. No cell allows it."""


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of a request."""

    point: str
    """Of the fault kit."""
    places: Mapping[str, str]
    """Role -> the keys of its rule; roles that have a part in the phase, the one that stands for others first."""
    asking: Asking = Asking.FRESH


PHASES: Mapping[str, Phase] = {
    "route": Phase("route", {"gateway": "side=sent"}),
    "prefill_queue": Phase("prefill_queue", {"prefill": ""}),
    "lookup": Phase("lookup", {"prefill": "side=heard", "kvstore": "side=heard"}, Asking.STORED),
    "fetch": Phase("fetch", {"prefill": "", "kvstore": "point=lookup side=sent"}, Asking.STORED),
    "compute": Phase("compute", {"prefill": "after=1"}),
    "grant": Phase("grant", {"decode": "side=heard", "prefill": "side=heard"}),
    "transfer": Phase("transfer", {"prefill": "side=work", "decode": "side=heard"}),
    "handover": Phase("handover", {"prefill": "side=sent", "decode": "side=heard"}),
    "commit": Phase("commit", {"decode": "side=sent", "prefill": "side=heard"}),
    "answer": Phase("answer", {"decode": "side=sent", "gateway": "side=heard after=3"}),
    "decode": Phase("decode", {"decode": "after=5"}),
    "spill": Phase("spill", {"prefill": "side=work", "kvstore": "side=heard", "decode": "side=sent"}),
    "cancel": Phase("cancel", {"decode": "side=heard", "gateway": "side=sent"}, Asking.LEFT),
}
"""In the order in which a request passes them."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the table."""

    victim: str
    """A role."""
    phase: str
    mode: Mode

    def __str__(self) -> str:
        return f"{self.victim}/{self.phase}/{self.mode}"

    @property
    def stands(self) -> str:
        """The role that stands still in the phase."""
        places = PHASES[self.phase].places
        return self.victim if self.victim in places else next(iter(places))

    @property
    def rule(self) -> str:
        """For each process of that role."""
        keys = PHASES[self.phase].places[self.stands].split()
        point = next((key.removeprefix("point=") for key in keys if key.startswith("point=")), PHASES[self.phase].point)
        return " ".join([f"{point}: stop times=1", *(key for key in keys if not key.startswith("point="))])

    @property
    def allowed(self) -> frozenset[Got]:
        """What the client may get. There is always somebody else who can do the victim's part, but for a dead gateway's."""
        asking = PHASES[self.phase].asking
        if asking is Asking.LEFT:
            return frozenset({Got.LEFT})
        if self.victim == "gateway" and self.mode is Mode.KILL:
            return frozenset({Got.BROKEN})
        if self.victim == "prefill" and asking is Asking.STORED and self.mode is not Mode.PAUSE:
            return frozenset({Got.ANSWER, Got.ERROR})  # the request names its prefill worker, so that it has to fetch
        return frozenset({Got.ANSWER})


ALL = tuple(Cell(victim, phase, mode) for mode in Mode for victim in VICTIMS for phase in PHASES)

_CHOSEN = """
    gateway/route/kill gateway/answer/kill
    prefill/compute/kill prefill/handover/kill prefill/transfer/cut
    decode/grant/kill decode/decode/kill decode/cancel/stop
    kvstore/lookup/kill kvstore/spill/kill kvstore/fetch/pause
    redis/prefill_queue/kill redis/commit/kill
"""
CHOSEN = tuple(Cell(victim, phase, Mode(mode)) for victim, phase, mode in (one.split("/") for one in _CHOSEN.split()))
"""For every run of the tests: each victim, each phase, each mode."""


def cell_named(text: str) -> Cell:
    """VICTIM/PHASE/MODE. Raises ValueError that names what there is."""
    known = {str(cell): cell for cell in ALL}
    if text not in known:
        raise ValueError(f"no cell {text!r}: VICTIM of {VICTIMS}, PHASE of {tuple(PHASES)}, MODE of {tuple(Mode)}")
    return known[text]
