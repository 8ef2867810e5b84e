"""One gateway process: its parts, built from its settings, and its life."""

import asyncio
import contextlib
import os
import secrets
import socket
import time
from collections.abc import Iterator

import uvicorn

from common.errors import ConfigError
from common.ids import Incarnation, WorkerId, peer_id
from common.log import Log
from common.messages.liveness import Member
from common.net.cache_reader import CacheReader
from common.net.cluster_key import read_cluster_key
from common.net.fault_kit import FaultKit, clock_of
from common.net.faulty import open_exchange
from common.net.faulty_redis import opens_registry
from common.net.host import kernel_identity, pid_space
from common.net.redis import Membership
from common.net.redis_outage import RedisOutage
from common.process_facts import policies_of, software_versions
from gateway.api_keys import ApiKeys, read_api_keys
from gateway.app import build_app
from gateway.border import Watch
from gateway.core.prompt_tree import PromptTree
from gateway.core.roster import Fit
from gateway.http_protocol import BoundedHttp
from gateway.memory_history import MemoryHistory
from gateway.metrics import GatewayMetrics
from gateway.model_files import ModelFiles, read_model_files
from gateway.request_log import RequestLog, log_line
from gateway.route_parts import build_dispatch
from gateway.routes_admin import AdminRoutes
from gateway.routes_openai import OpenAiRoutes, Served
from gateway.routes_status import StatusRoutes
from gateway.sampling import Limits
from gateway.settings import GatewaySettings
from gateway.switchboard import Switchboard
from gateway.tokens import Tokens
from gateway.tracing import tracing_from
from gateway.tree_keeper import TreeKeeper

_POLICIES = (
    *("route_prefill", "route_decode", "route_gate", "local_prefill_tokens", "prefill_fallback", "peer_fetch"),
    *("attempts", "max_inflight", "max_waiting", "cluster_key", "faults"),
)
"""Settings that others may want to know."""
_BACKLOG_CONNECTIONS = 2048
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_LAST_WORDS_S = 1  # for the errors that end what could not be finished


class Gateway:
    """Listens from its construction on; answers from `run` on."""

    def __init__(self, settings: GatewaySettings) -> None:
        """Raises ConfigError: no such model, a broken tokenizer, a taken port."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain_s = settings.drain_s
        files = read_model_files(settings.model)
        tokens = Tokens(files)
        self._listener = _listen(settings.host, settings.port)
        self.member = _member(settings, self._listener.getsockname()[1])
        self._model_name = settings.served_model_name or files.name
        self._log = Log(process=self.member.id)
        self._kit = None if settings.faults is None else FaultKit(settings.faults, self.member.id, self._log)
        metrics = GatewayMetrics()
        self._tracing = tracing_from(os.environ, self._log, self.member.id)
        sinks = [log_line(self._log)] if settings.log_requests else []
        self._requests = RequestLog([*sinks, *([] if self._tracing is None else [self._tracing.ended])], self._log)
        metrics.dropped["request_log_dropped"] = lambda: self._requests.dropped_total
        if (tracing := self._tracing) is not None:
            metrics.dropped["spans_dropped"] = lambda: tracing.dropped_total
        self._tree = PromptTree()
        reader = CacheReader(settings.redis, settings.cluster, self._model_name)
        self._clock = clock_of(self._kit)
        self._keeper = TreeKeeper(
            self._tree, reader, self._clock, RedisOutage(self._log, settings.redis, "prompt_tree")
        )
        keys = read_api_keys(
            settings.api_key, settings.api_keys, settings.admin_key, open_admin=settings.host in _LOOPBACK
        )
        self.switchboard = self._switchboard(settings, files, keys)
        self._memory = MemoryHistory(self.switchboard.workers, _unix_ms)
        self._membership = Membership(
            settings.redis, settings.cluster, self.member, self.switchboard.on_members, opens_registry(self._kit)
        )
        app = build_app(
            self._openai(settings, files, tokens, metrics),
            StatusRoutes(self.member, self.switchboard, self._keeper, metrics, self._memory, self._membership),
            AdminRoutes(self.switchboard),
            Watch(metrics, self._log, self._requests, self._clock),
            keys,
        )
        self._server = _Server(
            uvicorn.Config(
                app,
                http=BoundedHttp,
                ws="none",
                lifespan="off",
                access_log=False,
                log_level="error",  # a warning for each wrong byte would let strangers fill the log
                server_header=False,
                timeout_graceful_shutdown=round(settings.drain_s) + _LAST_WORDS_S,
            )
        )

    def _switchboard(self, settings: GatewaySettings, files: ModelFiles, keys: ApiKeys) -> Switchboard:
        fit = Fit(self._model_name, files.vocab_tokens)
        dispatch = build_dispatch(settings, self.member, fit, self._tree, keys.terms, secrets.randbits(32))
        this = peer_id(self.member.id, self.member.incarnation)
        exchange = open_exchange(this, None, self._kit, read_cluster_key(settings.cluster_key), self._log)
        return Switchboard(dispatch, exchange, self._clock, self._log, self._keeper.on_members)

    def _openai(
        self, settings: GatewaySettings, files: ModelFiles, tokens: Tokens, metrics: GatewayMetrics
    ) -> OpenAiRoutes:
        served = Served(
            name=self._model_name,
            since_unix_s=int(time.time()),
            limits=Limits(files.vocab_tokens, files.context_tokens, files.end_tokens, settings.default_max_tokens),
            max_body_bytes=settings.max_body_bytes,
            request_timeout_ms=settings.request_timeout_s * 1000,
        )
        return OpenAiRoutes(served, tokens, self.switchboard, metrics, self._clock)

    async def run(self) -> None:
        """Serve until `ask_to_stop`; then finish what runs, and leave the membership.

        Raises ConfigError if Redis does not answer at the start.
        """
        self._loop = asyncio.get_running_loop()
        self.switchboard.start()
        self._keeper.start()
        self._memory.start()
        self._requests.start()
        try:
            await asyncio.to_thread(self._membership.join)
            on = self._kit is not None
            self._log.event("listening", url=self.member.endpoint, model=self._model_name, faults_on=on)
            await self._server.serve(sockets=[self._listener])
        finally:
            await asyncio.to_thread(self._membership.stop)
            self._memory.stop()
            await self._keeper.stop()
            self.switchboard.stop()
            self._listener.close()
            await asyncio.to_thread(self._end_of_requests)
            self._log.event("stopped")

    def _end_of_requests(self) -> None:
        self._requests.stop()
        if self._tracing is not None:
            self._tracing.stop()

    def ask_to_stop(self) -> None:
        """Begin to stop; asked again, stop without waiting for running requests. Any thread."""
        self._server.force_exit = self._server.should_exit
        self._server.should_exit = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._end_all_later)

    def _end_all_later(self) -> None:
        text = f"the gateway was told to stop, and its {self._drain_s:g} s to drain are over"
        asyncio.get_running_loop().call_later(self._drain_s, self.switchboard.end_all, text)


class _Server(uvicorn.Server):
    """A server without signal handlers: its own would end the process before the membership is left."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `__main__`."""
        yield


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, made before anything joins, so that a taken port ends the start at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(_BACKLOG_CONNECTIONS)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(f"cannot listen on --host={host} --port={port}: {error}") from error
    return listener


def _member(settings: GatewaySettings, port: int) -> Member:
    return Member(
        id=WorkerId(settings.id or f"gateway-{secrets.token_hex(3)}"),
        role="gateway",
        incarnation=Incarnation(secrets.randbits(64)),
        endpoint=f"http://{settings.advertise_host or settings.host}:{port}",
        host=kernel_identity(),
        pid=os.getpid(),
        pid_space=pid_space(),
        joined_unix_ms=_unix_ms(),
        versions=software_versions("penstock", "pyzmq", "torch"),
        policies=policies_of(settings, _POLICIES),
    )


def _unix_ms() -> int:
    return time.time_ns() // 1_000_000
