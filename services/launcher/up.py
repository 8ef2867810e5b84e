"""`penstock up`: a whole system on one machine, from an empty machine to a streamed answer, until Ctrl-C."""

import os
import shlex
import sys
import time
from collections.abc import Sequence

import httpx
import redis

from common.dump_signal import DumpSignal
from common.errors import ConfigError, ServingError
from common.net.redis import Registry
from common.net.redis_address import shown
from common.ports import free_port, port_is_free
from common.settings import load
from services.launcher.api import GatewayApi
from services.launcher.commands import settings_classes
from services.launcher.interrupts import Interrupted, Interrupts
from services.launcher.model_choice import chosen_model
from services.launcher.names import refuse_taken_names
from services.launcher.plan import WORKER_ROLES, ProcessPlan, Site, compute_threads, memory_plan, plan_processes
from services.launcher.readiness import Expected, missing
from services.launcher.redis_server import find_redis_server, redis_command
from services.launcher.settings import UpSettings
from services.launcher.state import write_state
from services.launcher.system import NameTaken, RunDir, StartFailed, System, log_text, wait_until
from services.launcher.tables import links_table, process_table

PROGRAM = (sys.executable, "-P", "-m", "services.launcher.cli")
"""How children are run. -P: a folder named `common` where the operator stands must not hide ours."""

_REDIS_START_S = 10.0
_WATCH_EVERY_S = 0.1
_QUESTION = "Say hello."
_ANSWER_TOKENS = 32
_ANSWER_TIMEOUT_S = 120.0


def main(argv: Sequence[str]) -> int:
    """Exit code 0 after Ctrl-C or SIGTERM, 1 if the system could not start or stay up, 2 if a setting must be changed.

    Raises ConfigError for what can be refused before anything starts.
    """
    dumps = DumpSignal()
    settings = load(UpSettings, argv, os.environ, known=settings_classes())
    _refuse_taken_ports(settings)
    run_dir = _run_dir(settings.run_dir)
    # torch makes a cache folder wherever temporary files go, needed or not: let it go away with ours
    environ = {"TORCHINDUCTOR_CACHE_DIR": str(run_dir.path / "torch"), **os.environ}
    try:
        model = chosen_model(settings.model, PROGRAM, environ)
        with Interrupts() as interrupts, System(environ, run_dir.log_dir, _say) as system:
            dumps.call(lambda: write_state(system))
            return _run(settings, model, run_dir, system, interrupts)
    finally:
        run_dir.remove()


def _run(settings: UpSettings, model: str, run_dir: RunDir, system: System, interrupts: Interrupts) -> int:
    code, drain_s = 0, settings.drain_s
    try:
        launch = Launch(settings, system, interrupts)
        launch.start(model, run_dir)
        launch.show()
        launch.first_answer()
        system.stage = "nothing: it watches its children"
        _say(f"up; logs are in {run_dir.log_dir}; Ctrl-C stops everything")
        while not interrupts.count:
            system.revive(time.monotonic())
            time.sleep(_WATCH_EVERY_S)
    except Interrupted:
        _say("stopped before it was up")
    except ServingError as error:
        print(f"penstock up: {error}", file=sys.stderr, flush=True)
        code = 2 if isinstance(error, ConfigError) else 1
        if not (isinstance(error, NameTaken) and system.of_role("gateway")):  # if so all is well here: answers may end
            drain_s = 0.0
    seen = interrupts.count
    system.stage = "its children to end"
    _say(f"stopping: requests get up to {drain_s:g} s to finish; Ctrl-C again stops at once" if drain_s else "stopping")
    try:
        with interrupts.breaking_in(seen):
            system.drain(drain_s)
        _say("stopped")
    except Interrupted:
        _say("stopped at once")
    return code


class Launch:
    """The start of one system, step by step. Owns nothing: the processes are the System's."""

    def __init__(self, settings: UpSettings, system: System, interrupts: Interrupts) -> None:
        self._settings, self._system, self._interrupts = settings, system, interrupts
        self._cores = len(os.sched_getaffinity(0))
        self._started_s = time.monotonic()

    def start(self, model: str, run_dir: RunDir) -> None:
        """Start everything and wait until every gateway can use every worker. Raises StartFailed, ConfigError."""
        settings = self._settings
        url = settings.redis or self._start_redis()
        self._system.stage = f"Redis to answer at {shown(url)}"
        self._wait_for_redis(url)
        self._system.watch_redis(lambda: self._why_no_redis(url) is None)
        site = Site(program=PROGRAM, model=model, redis=url, run_dir=str(run_dir.path), cores=self._cores)
        plans = plan_processes(settings, site)
        names = {plan.name for plan in plans}
        self._system.stage = "names that processes of another system may have"
        refuse_taken_names(url, settings.cluster, names, each_round=self._check, say=_say)
        for plan in plans:
            self._system.start(plan)
        _say(f"starting {', '.join(child.plan.name for child in self._system.children)}")
        self._system.stage = "every gateway to be ready and to know every worker"
        ready = wait_until(self._is_ready, timeout_s=settings.ready_timeout_s, each_round=self._check)
        if not ready:
            raise StartFailed(self._why_not_ready())

    def _check(self) -> None:
        self._interrupts.check()
        self._system.raise_if_ended()

    def _start_redis(self) -> str:
        port = free_port()
        url = f"redis://127.0.0.1:{port}/0"
        self._system.start(ProcessPlan("redis", "redis", redis_command(find_redis_server(), port), url=url))
        return url

    def _wait_for_redis(self, url: str) -> None:
        timeout_s = _REDIS_START_S if self._settings.redis is None else 0.0
        answers = wait_until(
            lambda: self._why_no_redis(url) is None, timeout_s=timeout_s, each_round=self._check, every_s=0.02
        )
        if not answers and (why := self._why_no_redis(url)) is not None:
            raise ConfigError(f"--redis={shown(url)}: does not answer: {why}")

    def _why_no_redis(self, url: str) -> str | None:
        try:
            registry = Registry(url, self._settings.cluster)
            try:
                registry.members()
            finally:
                registry.close()
        except (redis.RedisError, ConfigError) as error:
            return str(error)
        return None

    def _expected(self) -> list[Expected]:
        children = self._system.of_role(*WORKER_ROLES, "kvstore")
        return [Expected(child.plan.name, child.plan.role, child.pid) for child in children]

    def _gateways(self) -> list[GatewayApi]:
        key = self._settings.api_key
        return [GatewayApi(c.plan.url, key) for c in self._system.of_role("gateway") if c.plan.url is not None]

    def _lacking(self, api: GatewayApi) -> dict[str, str]:
        try:
            return missing(self._expected(), api.status())
        except httpx.HTTPError as error:
            return {api.url: f"does not answer: {error}"}

    def _is_ready(self) -> bool:
        for api in self._gateways():
            try:
                if not api.is_ready() or self._lacking(api):
                    return False
            finally:
                api.close()
        return True

    def _why_not_ready(self) -> str:
        lines = [f"not ready after {self._settings.ready_timeout_s:g} s (--ready-timeout-s):"]
        names: set[str] = set()
        for api in self._gateways():
            lacking = self._lacking(api)
            names |= set(lacking)
            lines += [f"  {name} {why}" for name, why in lacking.items()] or [f"  {api.url}: {api.why_not_ready()}"]
            api.close()
        for child in self._system.children:
            if child.plan.name in names or child.plan.role == "gateway":
                lines += [f"  the end of {child.plan.name}'s log:", log_text(child)]
        return "\n".join(lines)

    def show(self) -> None:
        """Print what runs where, how much KV it holds and how KV travels."""
        api = self._gateways()[0]
        status, settings = api.status(), self._settings
        api.close()
        rows = [(child.plan.name, child.pid, child.plan.url or "") for child in self._system.children]
        threads = compute_threads(settings, self._cores)
        parts = [process_table(rows, status, settings.device, threads), memory_plan(settings), links_table(status)]
        took_s = time.monotonic() - self._started_s
        _say("\n" + "\n\n".join(part for part in parts if part) + f"\n\nready after {took_s:.1f} s")

    def first_answer(self) -> None:
        """Stream one answer through the API as a client would, and show how to ask again. Raises StartFailed."""
        self._system.stage = "the first answer"
        api = self._gateways()[0]
        try:
            with self._interrupts.breaking_in():
                model = api.models()[0]
                _say(f"API: {api.url}/v1\n{curl(api.url, model, with_key=self._settings.api_key is not None)}\n")
                self._stream(api, model)
        except httpx.HTTPError as error:
            raise StartFailed(f"the first request failed: {error}") from error
        finally:
            api.close()

    def _stream(self, api: GatewayApi, model: str) -> None:
        asked_s, ttft_s = time.monotonic(), None
        print(f"first answer to {_QUESTION!r}: ", end="", flush=True)
        for piece in api.chat(model, _QUESTION, _ANSWER_TOKENS, _ANSWER_TIMEOUT_S):
            if piece and ttft_s is None:
                ttft_s = time.monotonic() - asked_s
            print(printable(piece), end="", flush=True)
        took_s = time.monotonic() - asked_s
        first = "no text" if ttft_s is None else f"first text after {ttft_s * 1e3:.0f} ms"
        _say(f"\n({first}, whole answer after {took_s * 1e3:.0f} ms)")


def curl(url: str, model: str, *, with_key: bool) -> str:
    """A request to paste into a shell."""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "{_QUESTION}"}}], "stream": true}}'
    key = ["-H", '"authorization: Bearer $PENSTOCK_API_KEY"'] if with_key else []
    return " ".join(
        ["curl -N", f"{url}/v1/chat/completions", "-H 'content-type: application/json'", *key, "-d", shlex.quote(body)]
    )


def printable(text: str) -> str:
    """Text of a model with random weights may hold control characters, which a terminal would obey."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text)


def _run_dir(named: str | None) -> RunDir:
    try:
        return RunDir(named)
    except OSError as error:
        raise ConfigError(f"--run-dir={named or '(unset)'}: cannot be used: {error}") from error


def _refuse_taken_ports(settings: UpSettings) -> None:
    for port in range(settings.port, settings.port + settings.gateways):
        try:
            free = port_is_free(settings.host, port)
        except OSError as error:
            raise ConfigError(f"--host={settings.host}: {error}") from error
        if not free:
            raise ConfigError(
                f"--port={settings.port}: {settings.host}:{port} is in use already, or may not be used; name another"
            )


def _say(text: str) -> None:
    print(text, flush=True)
