"""The long-lived system of the kill matrix: two of each process that has equals, each in a network of its own if that can be."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import redis

from common.messages.liveness import Member, Report
from tests.support.clients import status, until
from tests.support.driver import Driver
from tests.support.namespaces import Network
from tests.support.processes import Cluster
from tests.support.redis import redis_binary

ROLES: Mapping[str, tuple[str, ...]] = {
    "gateway": ("gateway-0", "gateway-1"),
    "prefill": ("prefill-0", "prefill-1"),
    "decode": ("decode-0", "decode-1"),
    "kvstore": ("kvstore-0",),
    "redis": ("redis",),
}
WORKERS = (*ROLES["prefill"], *ROLES["decode"])
REPORTING = (*WORKERS, *ROLES["kvstore"])
SILENCE_S = 2.0
"""The silence after which gateways and workers take each other for dead."""
LEASE_S = 4.0
START_WITHIN_S = 90.0
_HELD = ("pinned_blocks", "leases", "parked_bytes", "oldest_pin_ms", "waiting_disk_writes")
_REDIS_PORT, _HTTP_PORT = 6379, 8000


@dataclass(frozen=True, slots=True)
class Setup:
    """How the system is started."""

    workers: Mapping[str, object] = field(default_factory=dict)
    """Further flags of every worker."""
    roles: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """Further flags of the processes of a role."""


class System:
    """Owns the processes; only the victim of a cell is started again. `close` sees that all end well."""

    def __init__(self, folder: Path, model: Path, setup: Setup, network: Network | None) -> None:
        """`network`: None: all on this host's loopback, and nothing can be cut."""
        self.folder, self._model, self._setup, self._network = folder, model, setup, network
        self._addresses = {name: self._address(name) for names in ROLES.values() for name in names}
        if network is None:
            self._redis_url = f"unix://{folder / 'redis.sock'}"
        else:
            self._redis_url = f"redis://{self._addresses['redis']}:{_REDIS_PORT}/0"
        self.cluster = Cluster(self._redis_url, folder)
        if network is not None:
            self.cluster.networks = {name: network.file(name) for name in self._addresses}
        self._urls: dict[str, str] = {}
        self._before: dict[str, Mapping[str, Member]] = {}
        """By killed process: who was there when it still was."""

    def _address(self, name: str) -> str:
        return "127.0.0.1" if self._network is None else self._network.add(name)

    @property
    def can_cut(self) -> bool:
        """Whether processes have networks of their own."""
        return self._network is not None

    # -- processes

    def start_all(self) -> None:
        """Everybody, and wait until all know each other."""
        self.start("redis")
        for names in ROLES.values():
            for name in names:
                if name != "redis":
                    self._write_rules(name, "")
                    self.start(name)
        self.cluster.await_members(*self._members, timeout_s=START_WITHIN_S)
        self.driver = Driver([self.cluster.members()[name] for name in REPORTING])

    @property
    def _members(self) -> tuple[str, ...]:
        return (*ROLES["gateway"], *REPORTING)

    def start(self, name: str) -> None:
        """Start one process; it is not awaited, but for Redis."""
        role, address = name.partition("-")[0], self._addresses[name]
        if role == "redis":
            self._start_redis(address)
            return
        flags: dict[str, object] = {"debug_faults": "true", "faults": f"@{self._faults(name)}"}
        if role == "gateway":
            port = 0 if self._network is None else _HTTP_PORT
            flags |= {"model": self._model, "served_model_name": "m", "host": address, "port": port}
            flags |= {"retry_wait_s": 6, "local_prefill_tokens": 0, "peer_fetch": "off"}
            flags |= {"silent_worker_ms": round(SILENCE_S * 1000)}
        elif role == "kvstore":
            flags |= {"host_memory": "32MiB", "bind": f"tcp://{address}:0"}
        else:
            flags |= {"model": self._model, "served_model_name": "m", "dtype": "float32", "fetch": "always"}
            flags |= {"bind": f"tcp://{address}:0", "device_memory": "4MiB", "max_step_tokens": 64}
            flags |= {"silent_peer_ms": round(SILENCE_S * 1000), "lease_ms": round(LEASE_S * 1000)}
            flags |= self._setup.workers
        self.cluster.start(role, name, **{**flags, **self._setup.roles.get(role, {})})

    def _start_redis(self, address: str) -> None:
        where = ["--bind", address, "--port", str(_REDIS_PORT), "--protected-mode", "no"]
        if self._network is None:
            where = ["--port", "0", "--unixsocket", self._redis_url.removeprefix("unix://")]
        inside = [] if self._network is None else self._network.inside("redis")
        self.cluster.run("redis", [*inside, redis_binary(), *where, "--save", "", "--dir", str(self.folder)])
        client = redis.Redis.from_url(self._redis_url, socket_timeout=1, socket_connect_timeout=1)

        def answers() -> bool:
            with suppress(redis.RedisError):
                return bool(client.ping())
            return False

        until(answers, "Redis answers")
        client.close()

    def kill(self, name: str) -> None:
        """kill -9, and expect no reports any more."""
        if name in REPORTING:
            self.driver.remove(name)
        if name != "redis":
            self._before[name] = self.cluster.members()
        self.cluster.kill(name)

    def restart(self, name: str) -> None:
        """Start a killed process again, and wait until it has joined."""
        self.start(name)
        self.await_back(name)

    def begun_again(self, name: str) -> bool:
        """Whether a killed process was started again, and not awaited yet."""
        return name in self._before and self.cluster.processes[name].poll() is None

    def await_back(self, name: str) -> None:
        """Wait until a killed process that was started again has joined."""
        if name == "redis":
            return
        self.cluster.await_members(name, besides=self._before[name], timeout_s=START_WITHIN_S)
        del self._before[name]
        self._urls.pop(name, None)
        if name in REPORTING:
            self.driver.add(self.cluster.members()[name])

    def cut(self, name: str) -> None:
        """Take the process off the network."""
        assert self._network is not None, "there are no namespaces"
        self._network.cut(name)

    def mend(self, name: str) -> None:
        """Put it back."""
        assert self._network is not None, "there are no namespaces"
        self._network.mend(name)

    def ended(self) -> list[str]:
        """Processes that have ended, and how: nobody should but those that were killed."""
        codes = {name: process.poll() for name, process in self.cluster.processes.items()}
        return [f"{name} ended with {code}" for name, code in codes.items() if code is not None]

    # -- faults

    def _faults(self, name: str) -> Path:
        return self.folder / f"{name}.faults"

    def arm(self, rules: str, *names: str) -> None:
        """Give running processes new rules, and wait until they have them."""
        before = {name: self._armings(name) for name in names}
        for name in names:
            self._write_rules(name, rules)
        late = [
            name for name in names if self.cluster.processes[name].poll() is None and not self.cluster.stopped(name)
        ]
        until(lambda: all(self._armings(n) > before[n] for n in late), f"{late} obey {rules!r}", timeout_s=5.0)

    def _write_rules(self, name: str, rules: str) -> None:
        """Whole: a process never sees half a file."""
        fresh = self._faults(name).with_suffix(".new")
        fresh.write_text(rules)
        os.replace(fresh, self._faults(name))

    def _armings(self, name: str) -> int:
        """How often it has told of new rules."""
        return self.cluster.log(name).count('"faults_armed"')

    # -- state

    def url(self, gateway: str) -> str:
        """Of a gateway that runs."""
        if self._network is not None:
            return f"http://{self._addresses[gateway]}:{_HTTP_PORT}"
        if gateway not in self._urls:
            self._urls[gateway] = self.cluster.members()[gateway].endpoint
        return self._urls[gateway]

    def charged(self, gateway: str, role: str) -> str | None:
        """Which process of a role that gateway has given work to; None if none."""
        if role not in ("prefill", "decode"):
            return None
        workers = status(self.url(gateway))
        return next((name for name in ROLES[role] if name in workers and workers[name]["charged_requests"]), None)

    def held(self, *but: str) -> list[str]:
        """What is not back at its start, by what processes themselves report now; `but`: not asked."""
        names = [name for name in REPORTING if name not in but]
        number = self.driver.ping()
        reports = self.driver.reports

        def fresh() -> bool:
            return all(name in reports and reports[name].sequence >= number for name in names)

        try:
            self.driver.until(fresh, "everybody reports", timeout_s=1.0)
        except AssertionError:
            late = [n for n in names if n not in reports or reports[n].sequence < number]
            return [f"{name} does not report" for name in late]
        held = [f"{name}: {what}" for name in names for what in held_by(reports[name])]
        return held + [what for name in ROLES["gateway"] if name not in but for what in self._held_by_gateway(name)]

    def _held_by_gateway(self, name: str) -> list[str]:
        try:
            seen = httpx.get(f"{self.url(name)}/status", timeout=1).json()
        except (httpx.HTTPError, KeyError):
            return [f"{name} shows no status"]
        gateway = seen["gateway"]
        held = [f"{name}: {key} {gateway[key]}" for key in ("open_requests", "waiting_requests") if gateway[key]]
        charged = [w for w in seen["workers"] if w["charged_requests"]]
        return held + [f"{name}: {w['charged_requests']} requests charged to {w['id']}" for w in charged]

    def unready(self) -> list[str]:
        """Who does not see whom, of all that should: both gateways everybody, and workers their ways to each other."""
        missing: list[str] = []
        try:
            members = self.cluster.members()
        except redis.RedisError:
            return ["Redis does not answer"]
        life = {name: f"{member.incarnation:016x}" for name, member in members.items()}
        if absent := set(self._members) - set(life):
            return [f"not in the membership: {sorted(absent)}"]
        for gateway in ROLES["gateway"]:
            try:
                workers = status(self.url(gateway))
                ready = httpx.get(f"{self.url(gateway)}/ready", timeout=1).status_code == 200
            except httpx.HTTPError:
                return [f"{gateway} does not answer"]
            missing += [] if ready else [f"{gateway} is not ready"]
            for name in REPORTING:
                seen = workers.get(name)
                if seen is None or seen["incarnation"] != life[name] or seen["state"] != "ready":
                    missing.append(f"{gateway} does not have {name}")
                elif name in WORKERS:
                    reached = {link["peer"] for link in seen["transports"]}
                    wanted = ROLES["kvstore"] + (ROLES["decode"] if name in ROLES["prefill"] else ())
                    missing += [f"{name} has no way to {n}" for n in wanted if f"{n}@{life[n]}" not in reached]
        return missing

    # -- the end

    def close(self) -> list[str]:
        """Tell everybody to stop; a worker checks its books first. Returns who ended otherwise than well."""
        if hasattr(self, "driver"):
            self.driver.exchange.close()
        others = {name: process for name, process in self.cluster.processes.items() if name != "redis"}
        wrong: list[str] = []
        for name, process in others.items():
            if process.poll() is None:
                process.terminate()
                self.cluster.resume(name)
        for name, process in others.items():
            with suppress(Exception):  # what does not end is killed with the cluster
                process.wait(timeout=20)
            if process.returncode != 0:
                wrong.append(f"{name} ended with {process.returncode}: {self.cluster.log(name)[-1500:]}")
        self.cluster.close()
        return wrong


def held_by(report: Report) -> list[str]:
    """What a worker or a store holds that is neither free nor only cached."""
    pages, queue = report.pages, report.queue
    states = ("reserved", "granted", "active", "quarantined")
    held = [f"{getattr(pages, state)} pages {state}" for state in states if getattr(pages, state)]
    if pages.free + pages.cached + pages.lent != pages.total:
        held.append(f"{pages.total - pages.free - pages.cached - pages.lent} pages not free")
    held += [f"{getattr(queue, k)} {k}" for k in ("waiting", "running", "handing_over") if getattr(queue, k)]
    return held + [f"{gauge} {report.gauges[gauge]:g}" for gauge in _HELD if report.gauges.get(gauge)]


@contextmanager
def running(folder: Path, model: Path, setup: Setup, network: Network | None) -> Iterator[System]:
    """A system that serves; it must end well too."""
    system = System(folder, model, setup, network)
    try:
        system.start_all()
        until(lambda: not system.unready(), "everybody is ready", timeout_s=START_WITHIN_S)
        yield system
    finally:
        wrong = system.close()
    assert not wrong, wrong
