"""The fault kit of one process: its rules, from a text or a file that may change, and the faults that end a process.

Only made where `--faults` is set. Wrappers (faulty.py, wherever something can go wrong) strike points and do what they
are told.
"""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from common.clock import Clock, FaultyClock, MonotonicClock
from common.errors import ConfigError
from common.faults.plan import NOTHING, FaultPlan, Outcome
from common.faults.points import Kind, Point, Side
from common.faults.rules import parse_rules, rules_for
from common.log import Log

LOOK_MS = 20.0
"""How often a file of rules is looked at, at most."""
_Stamp = tuple[int, int, int]


def send_to_self(number: int) -> None:
    """A signal to this process."""
    os.kill(os.getpid(), number)


class FaultKit:
    """Owns the plan. Any thread may strike; the one that strikes `kill` or `stop` takes the process with it."""

    def __init__(
        self,
        spec: str,
        process: str,
        log: Log,
        *,
        clock: Clock | None = None,
        end: Callable[[int], None] = send_to_self,
    ) -> None:
        """`spec`: rules, or @FILE; a file that is not there has none. `end`: sends this process a signal.

        Raises ConfigError for rules that cannot be read. Those of a file that changes are refused in the log, and the
        old ones stay. Counts begin anew with every change of the file.
        """
        self._process, self._log, self._end = process, log, end
        self._clock: Clock = clock or MonotonicClock()
        self._path = Path(spec[1:]) if spec.startswith("@") else None
        self._lock = threading.Lock()  # guards what follows
        self._stamp = None if self._path is None else _stamp(self._path)
        self._looked_ms = self._clock.now_ms()
        self._past: dict[tuple[Point, Kind], int] = {}  # faults of plans that were replaced
        try:
            self._plan = self._read(spec if self._path is None else _text(self._path))
        except (ValueError, OSError) as error:
            raise ConfigError(f"--faults={spec}: {error}") from error

    def strike(self, point: Point, side: Side, peer: str = "", *, carries_kv: bool = False) -> Outcome:
        """What goes wrong here, told in the log. Does not return from `kill`, and from `stop` only when continued.

        `peer`: id of the other side. `carries_kv`: whether a message is followed by KV.
        """
        with self._lock:
            self._look()
            outcome = self._plan.hit(point, side, peer, carries_kv=carries_kv)
        if outcome is NOTHING:
            return NOTHING
        for fault in outcome.faults:
            if fault.news:
                self._log.event("fault", point=point, kind=fault.rule.kind, side=side, hit=fault.hit, peer=peer)
            if fault.rule.kind is Kind.KILL:
                self._end(signal.SIGKILL)
            elif fault.rule.kind is Kind.STOP:
                self._end(signal.SIGSTOP)
        return outcome

    def look(self) -> None:
        """Read the file of rules if it has changed. Now and then, also where nothing is struck."""
        with self._lock:
            self._look()

    def counters(self) -> dict[str, float]:
        """As in reports."""
        with self._lock:
            totals = dict(self._past)
            _add(totals, self._plan)
        return {
            f"faults_injected_total{{point={point},kind={kind}}}": float(count)
            for (point, kind), count in sorted(totals.items())
        }

    def gauges(self) -> dict[str, float]:
        """As in reports: that there is a kit, and how many rules are in force."""
        with self._lock:
            return {"faults_on": 1.0, "fault_rules": float(len(self._plan.rules))}

    def _look(self) -> None:
        now_ms = self._clock.now_ms()
        if self._path is None or 0 <= now_ms - self._looked_ms < LOOK_MS:
            return
        self._looked_ms = now_ms
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            plan = self._read(_text(self._path))
        except (ValueError, OSError) as error:
            self._log.event("faults_refused", file=str(self._path), text=str(error))
            return
        _add(self._past, self._plan)
        self._plan = plan

    def _read(self, text: str) -> FaultPlan:
        """The rules that this process obeys, told in the log."""
        rules = parse_rules(text)
        plan = FaultPlan(rules_for(rules, self._process))
        self._log.event("faults_armed", rules=len(plan.rules), of=len(rules))
        return plan


def _add(totals: dict[tuple[Point, Kind], int], plan: FaultPlan) -> None:
    for key, count in plan.injected.items():
        totals[key] = totals.get(key, 0) + count


def _stamp(path: Path) -> _Stamp | None:
    """Changes when the file does; None: there is none."""
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_mtime_ns, state.st_size, state.st_ino


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def clock_of(kit: FaultKit | None) -> Clock:
    """The clock of a process: every reading strikes `clock`, if it has a kit."""
    if kit is None:
        return MonotonicClock()
    return FaultyClock(MonotonicClock(), jump_ms=lambda: kit.strike(Point.CLOCK, Side.WORK).ms_of(Kind.JUMP))
