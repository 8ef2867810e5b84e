"""One cell: catch a request in its phase, do the deed, and see that everybody is answered, serves on, and holds nothing."""

import itertools
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.matrix.cells import PHASES, Asking, Cell, Got, Mode
from tests.faults.matrix.system import ROLES, SILENCE_S, START_WITHIN_S, System
from tests.support.clients import Stream, random_prompt, until
from tests.support.reference import Reference

AFTER_A_KILL_S = 10.0
AFTER_SILENCE_S = SILENCE_S + 10.0
FREED_WITHIN_S = 10.0 + 5.0
"""The longest lease (of blocks that a worker has found and not read yet, which it may never release) and five seconds."""
_AWAY_S = 3.6
"""A stop or a cut: longer than the silence after which anybody takes anybody for dead (3 s, of the KV store)."""
_PAUSED_S = 0.4
_NOTICED_S = 0.5
"""From the end of the silence limit until everybody has looked."""
_FILLERS = 3
"""Prompts computed while the victim is away: of the pages that it was given they take more than there were."""
_CAUGHT_WITHIN_S = 15.0
LONG_TOKENS, _ANSWER_TOKENS, _SHORT_TOKENS = 200, 40, 8
_LEFT_TOKENS, _LEAVES_AFTER_TOKENS, _SEEN_TOKENS = 800, 8, 120
"""What is asked for by a client that leaves, when it leaves, and how much of what it read by then is compared."""


class Asked:
    """Two prompts and what transformers answers. Every request has a salt of its own, so that no cache knows it."""

    def __init__(self, model: Path, long_tokens: int = LONG_TOKENS) -> None:
        """`long_tokens`: of the longer one: some blocks."""
        rng, reference = random.Random(8), Reference(model)
        self.long, self.short = random_prompt(rng, long_tokens), random_prompt(rng, 40)
        self.expected = {_ANSWER_TOKENS: reference.generate(self.long, _ANSWER_TOKENS)}
        self.expected[_LEFT_TOKENS] = reference.generate(self.long, _SEEN_TOKENS)
        self.expected[_SHORT_TOKENS] = reference.generate(self.short, _SHORT_TOKENS)
        self._salts = itertools.count()

    def salt(self) -> str:
        """A new one."""
        return f"salt-{next(self._salts)}"

    def request(self, url: str, salt: str, *, leaves: bool = False, prefill: str | None = None) -> Stream:
        """The long one. `prefill`: who computes it, and nobody else."""
        headers = {} if prefill is None else {"x-penstock-route-prefill": f"worker={prefill}"}
        n_tokens, leave_after = (_LEFT_TOKENS, _LEAVES_AFTER_TOKENS) if leaves else (_ANSWER_TOKENS, None)
        return Stream(url, self.long, n_tokens, leave_after=leave_after, headers=headers, cache_salt=salt)

    def another(self, url: str) -> Stream:
        """The short one."""
        return Stream(url, self.short, _SHORT_TOKENS, cache_salt=self.salt())

    def judge(self, stream: Stream) -> Got:
        """What the client got."""
        expected = self.expected[stream.max_tokens]
        if stream.left:
            seen = min(len(stream.tokens), len(expected))
            return Got.LEFT if stream.tokens[:seen] == expected[:seen] else Got.WRONG
        if stream.tokens != expected[: len(stream.tokens)]:
            return Got.WRONG
        if stream.broken:
            return Got.BROKEN
        if stream.error is not None:
            return Got.ERROR if "phase" in stream.error["message"] else Got.WRONG
        return Got.ANSWER if stream.tokens == expected and stream.finish == "length" else Got.WRONG


@dataclass(slots=True)
class Outcome:
    """A row of the table."""

    cell: Cell
    got: Got | None = None
    """None: the cell did not come so far."""
    text: str = ""
    """Of the error that the client got."""
    answered_s: float = 0.0
    """From the deed to the last word."""
    others_s: float = 0.0
    """The same of the request that was sent right after the deed."""
    freed_s: float = 0.0
    """From the last answer, or the victim's return, until nobody held anything."""
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


class Trial:
    """Runs one cell in a system that all cells share."""

    def __init__(self, system: System, asked: Asked, cell: Cell) -> None:
        self._system, self._asked, self._cell = system, asked, cell
        self._outcome = Outcome(cell)
        self._phase = PHASES[cell.phase]

    def run(self) -> Outcome:
        """Never raises for what the cell is about: the problems are in the outcome."""
        try:
            self._run()
        except AssertionError as error:
            self._outcome.problems.append(str(error))
            self._clear()
        return self._outcome

    def _run(self) -> None:
        system, cell, outcome = self._system, self._cell, self._outcome
        salt = self._prepare()
        system.arm(cell.rule, *ROLES[cell.stands])
        stream = self._ask(salt)
        caught = self._caught(stream)
        victim = caught if cell.stands == cell.victim else self._involved(caught)
        system.arm("", *ROLES[cell.stands])
        deed_s = time.monotonic()
        self._do(victim)
        if caught != victim or cell.mode is Mode.CUT:
            system.cluster.resume(caught)
        other = self._asked.another(system.url("gateway-1"))
        salts = self._fill_what_is_free(deed_s) if cell.mode in (Mode.STOP, Mode.CUT) else []
        if cell.mode is not Mode.KILL:
            self._undo(victim, deed_s)
        limit_s = AFTER_A_KILL_S if cell.mode is Mode.KILL else AFTER_SILENCE_S
        outcome.answered_s = self._await(stream, deed_s, limit_s, "the request")
        outcome.others_s = self._await(other, deed_s, limit_s, "the other request")
        outcome.got = self._asked.judge(stream)
        if stream.error is not None:
            outcome.text = stream.error["message"]
        if outcome.got not in cell.allowed:
            outcome.problems.append(f"the client got {outcome.got} after {len(stream.tokens)} tokens {outcome.text}")
        if self._asked.judge(other) is not Got.ANSWER:
            outcome.problems.append(f"another client got {self._asked.judge(other)}: {other.error}")
        self._see_all_freed(victim)
        for salt in salts:
            self._ask_right(salt, "what was cached while the victim was away, asked for again,")

    def _fill_what_is_free(self, deed_s: float) -> list[str]:
        """Once the victim is taken for dead: put KV where it may still write, and remember under which salts."""
        until(lambda: time.monotonic() > deed_s + SILENCE_S + _NOTICED_S, "the victim was silent for long")
        salts = [self._asked.salt() for _ in range(_FILLERS)]
        for salt in salts:
            self._ask_right(salt, "while the victim was away, a third client")
        return salts

    def _ask_right(self, salt: str, who: str) -> None:
        """The long request, of which the victim of this cell is no part."""
        stream = self._asked.request(self._system.url("gateway-1"), salt)
        stream.wait(AFTER_SILENCE_S)
        got = self._asked.judge(stream)
        if got is not Got.ANSWER:
            self._outcome.problems.append(f"{who} got {got} after {len(stream.tokens)} tokens: {stream.error}")

    def _prepare(self) -> str:
        """The salt to ask with, when the store knows the prompt if it should."""
        salt = self._asked.salt()
        if self._phase.asking is Asking.STORED:
            stored = self._asked.request(self._system.url("gateway-0"), salt, prefill="prefill-1")
            stored.wait(AFTER_SILENCE_S)
            assert self._asked.judge(stored) is Got.ANSWER, f"the prompt to be stored got {stored.error}"
            self._until_free()
        return salt

    def _ask(self, salt: str) -> Stream:
        leaves = self._phase.asking is Asking.LEFT
        stored = self._phase.asking is Asking.STORED
        # A prefill worker that is gone from the request's way by then must still be the one that was on it.
        pinned = stored or (self._cell.victim == "prefill" and self._cell.stands != "prefill")
        prefill = "prefill-0" if pinned else None
        return self._asked.request(self._system.url("gateway-0"), salt, leaves=leaves, prefill=prefill)

    def _caught(self, stream: Stream) -> str:
        """Who stands still."""
        names, caught = ROLES[self._cell.stands], list[str]()

        def stands() -> bool:
            caught[:] = [name for name in names if self._system.cluster.stopped(name)]
            return bool(caught)

        until(stands, f"{self._cell.stands} stands at {self._cell.rule}", timeout_s=_CAUGHT_WITHIN_S)
        return caught[0]

    def _involved(self, caught: str) -> str:
        """The process of the victim's role that has to do with the request, if any has."""
        if self._cell.stands == "gateway" or self._cell.victim == "prefill":
            return ROLES[self._cell.victim][0]
        return self._system.charged("gateway-0", self._cell.victim) or ROLES[self._cell.victim][0]

    def _do(self, victim: str) -> None:
        match self._cell.mode:
            case Mode.KILL:
                self._system.kill(victim)
            case Mode.STOP | Mode.PAUSE:
                self._system.cluster.pause(victim)
            case Mode.CUT:
                self._system.cut(victim)

    def _undo(self, victim: str, deed_s: float) -> None:
        away_s = _PAUSED_S if self._cell.mode is Mode.PAUSE else _AWAY_S
        time.sleep(max(0.0, deed_s + away_s - time.monotonic()))  # how long it is away is what the cell is about
        if self._cell.mode is Mode.CUT:
            self._system.mend(victim)
        else:
            self._system.cluster.resume(victim)

    def _await(self, stream: Stream, deed_s: float, limit_s: float, what: str) -> float:
        """Seconds from the deed to the last word."""
        until(
            lambda: stream.answered_s is not None, f"{what} is answered", timeout_s=deed_s + limit_s - time.monotonic()
        )
        assert stream.answered_s is not None
        return max(0.0, stream.answered_s - deed_s)

    def _see_all_freed(self, victim: str) -> None:
        """Survivors first, by themselves; then everybody, the victim too, and all see each other again."""
        system, began_s = self._system, time.monotonic()
        if self._cell.mode is Mode.KILL:
            self._until_free(victim)
            self._outcome.freed_s = time.monotonic() - began_s
            system.restart(victim)
        self._until_free()
        if self._cell.mode is not Mode.KILL:
            self._outcome.freed_s = time.monotonic() - began_s
        self._settle()

    def _until_free(self, *but: str) -> None:
        held: list[str] = ["nobody was asked"]

        def nothing_held() -> bool:
            held[:] = self._system.held(*but)
            return not held

        try:
            until(nothing_held, "nothing is held", timeout_s=FREED_WITHIN_S)
        except AssertionError:
            raise AssertionError(f"still held {FREED_WITHIN_S:g} s later: {'; '.join(held)}") from None

    def _settle(self) -> None:
        unready: list[str] = []

        def ready() -> bool:
            unready[:] = self._system.unready()
            return not unready

        try:
            until(ready, "all see each other", timeout_s=START_WITHIN_S)
        except AssertionError:
            raise AssertionError(f"not ready {START_WITHIN_S:g} s later: {'; '.join(unready)}") from None
        assert not self._system.ended(), f"{self._system.ended()}"

    def _clear(self) -> None:
        """After a failure: what the next cell needs, by force if it must."""
        system = self._system
        for names in ROLES.values():
            for name in names:
                if system.can_cut:
                    system.mend(name)
                if system.cluster.processes[name].poll() is None:
                    system.cluster.resume(name)
        system.arm("", *ROLES[self._cell.stands])
        for name in ("redis", *(n for role, names in ROLES.items() if role != "redis" for n in names)):
            if system.cluster.processes[name].poll() is not None:
                system.restart(name)
            elif system.begun_again(name):
                system.await_back(name)
        try:
            self._until_free()
            self._settle()
        except AssertionError as error:
            self._outcome.problems.append(f"afterwards: {error}")
            for name in (*ROLES["gateway"], *ROLES["prefill"], *ROLES["decode"], *ROLES["kvstore"]):
                if system.cluster.processes[name].poll() is None:
                    system.kill(name)
                system.restart(name)
            self._settle()
