"""The processes of one system: started together, kept alive, drained in order."""

import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from common.errors import EXIT_SUCCEEDED, ConfigError, ServingError
from services.launcher.plan import WORKER_ROLES, ProcessPlan
from services.launcher.processes import Child, end
from services.launcher.restarts import GiveUp, RestartPolicy

_REST_END_S = 10.0
_TAIL_LINES = 12
_REDIS_AGAIN_S = 1.0
_EXIT_SETTING = 2  # of every process of ours: a setting must be changed


class StartFailed(ServingError):
    """A process ended, or did not become ready, before the system was up."""

    code = "start_failed"


class NameTaken(ConfigError):
    """A process of another system has the name of one of ours: in one cluster either ends the other's."""

    def __init__(self, text: str) -> None:
        """`text`: who has found it; what to do is added."""
        super().__init__(f"{text}; end one of the two systems, or start it with a --cluster NAME of its own")


class RunDir:
    """Folder of one system's logs and sockets; a temporary one goes away with the system."""

    def __init__(self, named: str | None) -> None:
        self._temporary = named is None
        if named is None:
            self.path = Path(tempfile.mkdtemp(prefix="penstock-"))
        else:
            self.path = Path(named).expanduser().resolve()
        self.log_dir = self.path / "logs"
        self.log_dir.mkdir(parents=True, exist_ok=True)

    def remove(self) -> None:
        """Delete it if it was made for this system alone; logs in a folder that the operator named stay."""
        if self._temporary:
            shutil.rmtree(self.path, ignore_errors=True)


class System:
    """Owns every child process. Leaving the `with` block ends them all, drained or not."""

    def __init__(self, environ: Mapping[str, str], log_dir: Path, say: Callable[[str], None]) -> None:
        """`say` prints one line for the operator."""
        self._environ, self._log_dir, self._say = environ, log_dir, say
        self.children: list[Child] = []
        self._policies: dict[str, RestartPolicy] = {}
        self._restart_at_s: dict[str, float] = {}
        self._redis_answers: Callable[[], bool] = lambda: True
        self.stage = "start"
        """What the launcher is at, and so waits for."""

    def watch_redis(self, answers: Callable[[], bool]) -> None:
        """Without Redis nobody can join: whoever died then is started again when `answers` says that it is back."""
        self._redis_answers = answers

    def __enter__(self) -> "System":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in reversed(self.children):
            child.close()

    def start(self, plan: ProcessPlan) -> Child:
        """Start one process. Raises StartFailed if its program cannot be run."""
        child = Child(plan, self._environ, self._log_dir)
        self.children.append(child)
        try:
            child.start()
        except OSError as error:
            raise StartFailed(f"{plan.name} cannot be started: {error}") from error
        self._policies[plan.name] = RestartPolicy()
        return child

    def raise_if_ended(self) -> None:
        """For the time of starting: StartFailed, or ConfigError if it was for a setting, in the words of who ended.

        NameTaken if another system has taken the name of one.
        """
        for child in self.children:
            code = child.poll()
            _raise_if_succeeded(child, code)
            if code is not None:
                kind = ConfigError if code == _EXIT_SETTING else StartFailed
                raise kind(f"{child.plan.name} ended during the start ({_cause(code)}):\n{log_text(child)}")

    def revive(self, now_s: float) -> None:
        """Start again who has died and whose wait is over. Raises ServingError if one dies too often.

        NameTaken if another system has taken the name of one: started again it would end that one, and so on for ever.
        """
        for child in self.children:
            name, code = child.plan.name, child.poll()
            if code is None:
                continue
            _raise_if_succeeded(child, code)
            due_s = self._restart_at_s.get(name)
            if (due_s is None or now_s >= due_s) and child.plan.role != "redis" and not self._redis_answers():
                if due_s is None:
                    self._say(
                        f"{name} ended ({_cause(code)}) while Redis does not answer; it is started when Redis is back"
                    )
                self._restart_at_s[name] = now_s + _REDIS_AGAIN_S
            elif due_s is None and code == _EXIT_SETTING and child.plan.role != "redis":
                again = self._policies[name].on_setting(now_s)
                self._restart_at_s[name] = again.at_s
                self._say(
                    f"{name} needs a setting changed: {_last_line(child)}; tried again in {again.at_s - now_s:.0f} s"
                )
            elif due_s is None:
                decision = self._policies[name].on_death(now_s)
                if isinstance(decision, GiveUp):
                    raise ServingError(f"{name} {decision.reason}, the last time by {_cause(code)}:\n{log_text(child)}")
                self._restart_at_s[name] = decision.at_s
                self._say(f"{name} ended ({_cause(code)}); restart {decision.attempt} in {decision.at_s - now_s:.1f} s")
            elif now_s >= due_s:
                del self._restart_at_s[name]
                child.start()
                self._say(f"{name} started again as pid {child.pid}")

    def restart_in_s(self, name: str) -> float | None:
        """When a child that ended is started again, or that is tried; None while it runs."""
        due_s = self._restart_at_s.get(name)
        return None if due_s is None else max(0.0, due_s - time.monotonic())

    def drain(self, drain_s: float) -> None:
        """End everything in the order in which work flows: gateways finish their requests, then workers, then stores."""
        waits = {("gateway",): drain_s + _REST_END_S, WORKER_ROLES: drain_s + _REST_END_S}
        for roles, wait_s in {**waits, ("kvstore",): _REST_END_S, ("redis",): _REST_END_S}.items():
            killed = end([child for child in self.children if child.plan.role in roles], wait_s)
            for name in killed:
                self._say(f"{name} did not end within {wait_s:g} s and was killed")

    def of_role(self, *roles: str) -> Sequence[Child]:
        """The children that play one of these roles, in the order of starting."""
        return [child for child in self.children if child.plan.role in roles]


def _raise_if_succeeded(child: Child, code: int | None) -> None:
    """Only another system can do that: this one starts nobody whose process still runs."""
    if code == EXIT_SUCCEEDED and child.plan.role != "redis":
        raise NameTaken(f"{child.plan.name} ended: another system of this --cluster uses this Redis, and took its name")


def log_text(child: Child) -> str:
    """The end of a child's log, indented."""
    lines = child.tail(_TAIL_LINES) or ["(it wrote nothing)"]
    return "\n".join(f"    {line}" for line in lines)


def _last_line(child: Child) -> str:
    return (child.tail(1) or ["(it wrote nothing)"])[0].strip()


def _cause(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def wait_until(
    done: Callable[[], bool], *, timeout_s: float, each_round: Callable[[], None], every_s: float = 0.1
) -> bool:
    """Ask `done` until it says yes; False after the deadline. `each_round` may raise to end the waiting."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        each_round()
        if done():
            return True
        if time.monotonic() >= deadline_s:
            return False
        time.sleep(every_s)
