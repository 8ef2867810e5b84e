"""Builds one worker out of its parts, cheap and fallible ones first, and takes it down again in reverse order."""

import contextlib
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, cast  # Any: what a launch gives is the engine's own

from common.cost.step_fit import StepFit
from common.errors import ConfigError
from common.ids import Incarnation, PeerId, WorkerId, peer_id
from common.log import Log
from common.messages.liveness import Member, ModelIdentity
from common.net.cluster_key import read_cluster_key
from common.net.fault_kit import FaultKit, clock_of
from common.net.faulty import open_exchange
from common.net.faulty_redis import open_publisher, opens_registry
from common.net.host import kernel_identity, pid_space
from common.net.redis import Membership
from common.process_facts import clock_gauges, policies_of, software_versions
from kvstore.memory.cuda_driver import CudaDriver
from kvstore.memory.page_memory import PageMemory
from kvstore.transport.block_mover import BlockMover
from kvstore.transport.copier import Copier
from kvstore.transport.cuda_pages import CudaMapper
from kvstore.transport.faulty import FaultyPages
from kvstore.transport.layer_events import layer_events
from kvstore.transport.load_gate import LoadGate
from kvstore.transport.own_pages import OwnPages, own_pages_of
from kvstore.transport.probe import Ways
from kvstore.transport.share import Share
from services.worker.build_core import build_core
from services.worker.build_parts import Machine
from services.worker.checksum_thread import ChecksumThread
from services.worker.chunk_lender import ChunkLender
from services.worker.core.host_buffer import HOST_BUFFER
from services.worker.core.resizing import PoolSize
from services.worker.device_memory import DeviceMemory
from services.worker.elastic_memory import arena_terms, own_scratch_bytes
from services.worker.engine.make import EngineLimits, make_engine, require_kv_layout
from services.worker.engine.torch_options import configure_torch
from services.worker.engine.workspace import needs_model, page_bytes_of
from services.worker.engine_thread import Engine, EngineThread
from services.worker.faulty_engine import FaultyEngine
from services.worker.host_memory import HostMemory, open_host_memory
from services.worker.inbox import BlocksMoved, CopyEnded, Events, HostGone, MembersRead, PeerGone, PeerJoined, ShareDied
from services.worker.links import Links, Movers
from services.worker.model.identity import InspectedModel, inspect_model
from services.worker.model.load import LoadedModel, load_inspected, require_device
from services.worker.page_resizer import PageResizer
from services.worker.profile.file import EngineIdentity, StepProfile, read_profile, start_from
from services.worker.profile.measure import processor_name
from services.worker.service import Ports, WorkerService
from services.worker.settings import WorkerSettings

_STEP_END_S = 30.0
_POLICIES = (
    *("caching", "eviction", "kvstore", "spill", "fetch", "on_load_failure", "transfer", "transport", "verify_kv"),
    *("kv_layout", "elastic", "layer_offload", "host_buffer_bytes", "admission", "spare_memory", "plan_ahead"),
    *("device", "cluster_key", "faults", "bind"),
)
"""Settings that others may want to know."""


class Worker:
    """A context manager: entering builds and joins the cluster, leaving withdraws and releases everything."""

    def __init__(self, role: str, settings: WorkerSettings) -> None:
        self._role, self._settings = role, settings
        self._incarnation = Incarnation(secrets.randbits(64))
        self._id = WorkerId(settings.id or f"{role}-{secrets.token_hex(3)}")
        self._log = Log(process=self._id)
        self._kit = None if settings.faults is None else FaultKit(settings.faults, self._id, self._log)
        self._clock = clock_of(self._kit)
        self._cleanup = contextlib.ExitStack()
        self._service: WorkerService | None = None
        self._membership: Membership | None = None

    def __enter__(self) -> "Worker":
        try:
            self._build()
        except BaseException:
            self._cleanup.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    def serve(self, stopping: Callable[[], bool], dump_asked: Callable[[], bool] = lambda: False) -> None:
        """Serve until `stopping()`, then drain: finish what is here, take nothing new.

        `dump_asked`: whether somebody wants to read the state in the log since the last call.
        """
        assert self._service is not None, "serve() before the worker was built"
        self._service.serve(stopping, dump_asked, drain_ms=self._settings.drain_s * 1e3)

    @property
    def succeeded(self) -> bool:
        """Whether a newer life has taken this one's name."""
        return self._service is not None and self._service.succeeded

    def _build(self) -> None:
        settings = self._settings
        peer = peer_id(self._id, self._incarnation)
        inspected = self._inspect()
        context_tokens = self._context_tokens(inspected.identity)
        profile = self._read_profile(inspected.identity)
        exchange = open_exchange(peer, settings.bind, self._kit, read_cluster_key(settings.cluster_key), self._log)
        self._cleanup.callback(exchange.close)
        limits = self._limits(context_tokens)
        threads = configure_torch(settings.threads)
        device = require_device(settings.device)
        require_kv_layout(settings.kv_layout, device)
        model = self._load(inspected) if needs_model(settings.device_memory, device) else None
        page_bytes = page_bytes_of(settings.device_memory, device, model, limits)
        mapped = DeviceMemory(settings, page_bytes, inspected.layout, device, limits, self._kit)
        self._cleanup.callback(mapped.close)
        memory = mapped.pages
        self._log.event("memory_planned", plan=str(memory.plan))
        inbox = Events(exchange.wake)
        driver = self._open_driver(memory)
        gate, marks = LoadGate(), layer_events(inspected.layout.layers, memory.backend.device)
        share = _share(peer, inbox, None if driver is None else CudaMapper(driver, memory.backend.device))
        loop_pages, copier_pages, mover_pages, read_pages = (own_pages_of(memory.pages, marks) for _ in range(4))
        movers = self._movers(share, mover_pages, gate, inbox, copier_pages)
        host = self._open_host(memory, driver, movers)
        share_path = share.serve(memory, self._run_dir())
        mine = self._member(exchange.endpoint, inspected.identity, str(inspected.folder), share_path, memory)
        links = Links(mine, loop_pages, movers, inbox, Ways(copier_pages, share, settings.transport, driver), self._kit)
        self._cleanup.callback(links.close)
        model = model or self._load(inspected)  # late: what can fail at once, should
        computing = make_engine(model, memory.pages.tensor, limits, marks, mapped.views)
        self._log.event("engine_ready", engine=type(computing).__name__, graphs=computing.capture())
        engine = EngineThread(self._stepping(computing), inbox, gate)
        self._cleanup.callback(engine.stop, _STEP_END_S)
        machine = Machine(
            size=_size(memory, host),
            layout=inspected.layout,
            fit=self._starting_fit(profile, model, threads),
            weight_bytes=model.weight_bytes,
            arena=arena_terms(computing, settings, memory, context_tokens),
            own_scratch_bytes=lambda: own_scratch_bytes(computing),
        )
        core = build_core(mine, settings, machine)
        resizer = PageResizer(memory, inbox, use_pages=engine.use_pages, tell_peers=links.tell_resized)
        events = open_publisher(settings.redis, settings.cluster, mine, self._kit)
        self._cleanup.callback(events.close)
        lender = ChunkLender(mapped.lending, inbox, use_scratch=engine.use_scratch)
        checksums = self._open_checksums(read_pages, inbox, machine.size.chunk_pages)
        counts = mapped.counters, mapped.check, self._clock, checksums, clock_gauges
        ports = Ports(exchange, inbox, engine, links, resizer, events, lender, *counts)
        self._service = WorkerService(core, ports, self._log, plan_ahead=self._plans_ahead)
        self._join(mine, inbox)
        told = {"threads": threads, "weight_bytes": model.weight_bytes, "faults_on": self._kit is not None}
        self._log.event("ready", role=self._role, endpoint=exchange.endpoint, **told)

    @property
    def _plans_ahead(self) -> bool:
        wanted = self._settings.plan_ahead
        return wanted == "on" or (wanted == "auto" and self._settings.device != "cpu")

    def _open_checksums(self, pages: OwnPages, inbox: Events, chunk_pages: int) -> ChecksumThread | None:
        if not self._settings.verify_kv:
            return None
        checksums = ChecksumThread(pages, inbox.put, chunk_pages)
        self._cleanup.callback(checksums.stop)
        return checksums

    def _join(self, mine: Member, inbox: Events) -> None:
        def on_members(members: list[Member]) -> None:
            inbox.put(MembersRead(members, self._clock.now_ms()))

        settings, opened = self._settings, opens_registry(self._kit)
        membership = Membership(settings.redis, settings.cluster, mine, on_members, opened)
        membership.join()
        self._cleanup.callback(membership.stop)

    def _movers(self, share: Share, pages: OwnPages, gate: LoadGate, inbox: Events, copier_pages: OwnPages) -> Movers:
        verify = self._settings.verify_kv
        own = pages if self._kit is None else FaultyPages(pages, self._kit, HOST_BUFFER)
        return Movers(
            share,
            Copier(lambda done: inbox.put(CopyEnded(done)), verify=copier_pages if verify else None),
            BlockMover(own, gate, lambda event: inbox.put(BlocksMoved(event)), self._clock, verify=verify),
        )

    def _stepping(self, computing: object) -> Engine[Any]:
        engine = cast(Engine[Any], computing)
        return engine if self._kit is None else FaultyEngine(engine, self._kit)

    def _open_driver(self, memory: PageMemory) -> CudaDriver | None:
        """For what belongs to others: their memory is mapped by it, and the host's is pinned by it."""
        if memory.backend.device.index is None:
            return None
        driver = CudaDriver(memory.backend.device.index)
        self._cleanup.callback(driver.close)
        return driver

    def _open_host(self, memory: PageMemory, driver: CudaDriver | None, movers: Movers) -> HostMemory | None:
        """For requests that give way, if such memory is wanted. Those of a prefill worker never do, unless it is asked for."""
        if self._role == "prefill" and self._settings.host_buffer_bytes is None:
            return None
        host = open_host_memory(self._settings, memory, driver, self._log)
        if host is not None:
            self._cleanup.callback(host.close)
            movers.blocks.attach(HOST_BUFFER, host.pages)
        return host

    def _context_tokens(self, identity: ModelIdentity) -> int:
        asked = self._settings.max_context_tokens
        if asked is not None and not 1 < asked <= identity.context_tokens:
            raise ConfigError(f"--max-context-tokens={asked}: {identity.name} takes 2 to {identity.context_tokens}")
        return asked or identity.context_tokens

    def _limits(self, context_tokens: int) -> EngineLimits:
        settings = self._settings
        return EngineLimits(
            max_running=settings.running_limit,
            max_step_tokens=settings.step_tokens_limit,
            context_tokens=context_tokens,
        )

    def _inspect(self) -> InspectedModel:
        settings = self._settings
        return inspect_model(
            settings.model,
            settings.dtype,
            name=settings.served_model_name,
            block_tokens=settings.block_tokens,
            kv_layout=settings.kv_layout,
        )

    def _load(self, inspected: InspectedModel) -> LoadedModel:
        self._log.event("loading_model", folder=str(inspected.folder))  # a large one takes minutes
        began_s = time.monotonic()
        model = load_inspected(inspected, self._settings.device)
        self._log.event("model_loaded", seconds=round(time.monotonic() - began_s, 1))
        return model

    def _read_profile(self, model: ModelIdentity) -> StepProfile | None:
        path = self._settings.cost_profile
        return None if path is None else read_profile(path, model, self._settings.device)

    def _starting_fit(self, profile: StepProfile | None, model: LoadedModel, threads: int) -> StepFit:
        """What is known of the engine's cost before its first step."""
        chunk_tokens = self._settings.step_tokens_limit
        if profile is None:
            return StepFit(chunk_tokens)
        processor = processor_name(model.device)
        mine = EngineIdentity(model=model.identity, device=model.device.type, processor=processor, threads=threads)
        start = start_from(profile, mine, chunk_tokens)
        self._log.event("cost_profile", file=self._settings.cost_profile, only_proportions=start.only_proportions)
        return start.fit

    def _run_dir(self) -> Path:
        if self._settings.run_dir is not None:
            folder = Path(self._settings.run_dir)
            try:
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            except OSError as error:
                raise ConfigError(f"--run-dir={folder}: {error.strerror}") from error
            return folder
        return Path(self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="penstock-")))

    def _member(self, endpoint: str, model: ModelIdentity, path: str, share_path: str, memory: PageMemory) -> Member:
        host = self._settings.advertise_host
        if host is not None:
            endpoint = f"tcp://{host}:{endpoint.rsplit(':', maxsplit=1)[-1]}"
        elif "//0.0.0.0:" in endpoint:
            endpoint = endpoint.replace("0.0.0.0", socket.gethostname())
        return Member(
            id=self._id,
            role=self._role,
            incarnation=self._incarnation,
            endpoint=endpoint,
            host=kernel_identity(),
            pid=os.getpid(),
            pid_space=pid_space(),
            share_path=share_path,
            share_kind=memory.kind,
            device_uuid=memory.device_uuid,
            model=model,
            context_tokens=self._settings.max_context_tokens,
            model_path=path,
            joined_unix_ms=time.time_ns() // 1_000_000,
            versions=software_versions("penstock", "pyzmq", "torch"),
            policies=policies_of(self._settings, _POLICIES),
        )


def _size(memory: PageMemory, host: HostMemory | None) -> PoolSize:
    plan, host_pages = memory.plan, 0 if host is None else host.n_pages
    return PoolSize(memory.pages.n_pages, plan.chunk_bytes // plan.page_bytes, plan.page_bytes, host_pages)


def _share(peer: PeerId, inbox: Events, mapper: CudaMapper | None) -> Share:
    return Share(
        peer,
        on_joined=lambda joined: inbox.put(PeerJoined(joined)),
        on_gone=lambda gone: inbox.put(PeerGone(gone)),
        on_lost=lambda lost: inbox.put(HostGone(lost)),
        on_died=lambda error: inbox.put(ShareDied(error)),
        mapper=mapper,
    )
