"""`penstock kvstore`: one KV store process. The only place that reads the environment and builds things."""

import os
import platform
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from common.clock import Clock
from common.dump_signal import DumpSignal
from common.errors import EXIT_SUCCEEDED, ConfigError
from common.ids import Incarnation, WorkerId, peer_id
from common.kv_layout import KvLayout
from common.log import Log
from common.messages.liveness import Member
from common.net.cluster_key import read_cluster_key
from common.net.fault_kit import FaultKit, clock_of
from common.net.faulty import open_exchange
from common.net.faulty_redis import open_publisher, opens_registry
from common.net.host import kernel_identity, pid_space
from common.net.redis import Membership
from common.process_facts import policies_of, software_versions
from common.settings import load, usage
from common.units import format_bytes
from kvstore.memory.available import available_memory
from kvstore.server.block_memory import BlockMemory
from kvstore.server.core.store import Budget, KvStoreCore
from kvstore.server.disk_folder import DiskFolder
from kvstore.server.disk_thread import DiskThread
from kvstore.server.faulty_disk import FaultyDiskFolder
from kvstore.server.inbox import Events, GuestGone, GuestJoined, MembersRead, ShareDied
from kvstore.server.page_checks import PageChecks
from kvstore.server.service import KvStoreService, Ports
from kvstore.server.settings import KvStoreSettings
from kvstore.transport.share import Share

_POLICIES = ("eviction", "verify_kv", "disk", "host_memory_bytes", "cluster_key", "faults", "bind")
_WILDCARDS = ("0.0.0.0", "*", "[::]")


def main(argv: Sequence[str]) -> int:
    """Run until SIGTERM or SIGINT, or until a newer life has this one's name.

    Exit code 0, 2 for a bad setting, or EXIT_SUCCEEDED.
    """
    if "--help" in argv or "-h" in argv:
        print(
            usage(KvStoreSettings, "penstock kvstore", "Keeps KV blocks in host memory for the workers of a cluster.")
        )
        return 0
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: signals.append(received))
    try:
        succeeded = run(load(KvStoreSettings, argv, os.environ), lambda: bool(signals), DumpSignal().take)
    except ConfigError as error:
        print(f"penstock kvstore: {error}", file=sys.stderr)
        return 2
    return EXIT_SUCCEEDED if succeeded else 0


def run(
    settings: KvStoreSettings, stopping: Callable[[], bool], dump_asked: Callable[[], bool] = lambda: False
) -> bool:
    """One KV store, from its parts to its end. Whether a newer life has taken its name."""
    worker = WorkerId(settings.id or f"kvstore-{secrets.token_hex(4)}")
    incarnation = Incarnation(secrets.randbits(64))
    log = Log(process=worker)
    layout = None if settings.model is None else _layout(settings.model, settings.dtype)
    peer = peer_id(worker, incarnation)
    key = read_cluster_key(settings.cluster_key)
    with ExitStack() as stack:
        kit = None if settings.faults is None else FaultKit(settings.faults, worker, log)
        exchange = stack.enter_context(closing(open_exchange(peer, settings.bind, kit, key, log)))
        inbox = Events(exchange.wake)
        memory = stack.enter_context(closing(BlockMemory(settings.host_memory_bytes, available_memory())))
        share = Share(
            peer,
            on_joined=lambda joined: inbox.put(GuestJoined(joined)),
            on_gone=lambda gone: inbox.put(GuestGone(gone)),
            on_died=lambda error: inbox.put(ShareDied(error)),
        )
        stack.callback(share.close)
        member = Member(
            id=worker,
            role="kvstore",
            incarnation=incarnation,
            endpoint=_advertised(exchange.endpoint, settings.advertise_host),
            host=kernel_identity(),
            pid=os.getpid(),
            pid_space=pid_space(),
            share_path=share.serve(memory, _run_dir(settings, stack)),
            model_path=settings.model,
            joined_unix_ms=time.time_ns() // 1_000_000,
            versions=software_versions("penstock", "pyzmq"),
            policies=policies_of(settings, _POLICIES),
        )
        disk_bytes = 0 if settings.disk is None else settings.disk_size_bytes
        core = KvStoreCore(member, Budget(memory.capacity_bytes, disk_bytes, settings.eviction), layout)
        checks = PageChecks(memory) if settings.verify_kv else None
        disk = _open_disk(settings, memory, inbox, stack, kit, checks)
        clock = clock_of(kit)
        stack.callback(_join(settings, member, inbox, clock, kit).stop)
        publisher = stack.enter_context(closing(open_publisher(settings.redis, settings.cluster, member, kit)))
        log.event(
            "ready",
            endpoint=member.endpoint,
            host_memory=format_bytes(memory.capacity_bytes),
            disk=settings.disk,
            blocks=core.capacity_blocks,
            faults_on=kit is not None,
        )
        ports = Ports(exchange, inbox, memory, publisher.publish, clock, disk, checks)
        KvStoreService(core, ports, log).serve(stopping, dump_asked)
        log.event("stopped")
    return core.succession.over


def _join(settings: KvStoreSettings, member: Member, inbox: Events, clock: Clock, kit: FaultKit | None) -> Membership:
    def on_members(members: list[Member]) -> None:
        inbox.put(MembersRead(members, clock.now_ms()))

    membership = Membership(settings.redis, settings.cluster, member, on_members, opens_registry(kit))
    membership.join()
    return membership


def _run_dir(settings: KvStoreSettings, stack: ExitStack) -> Path:
    if settings.run_dir is None:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="penstock-")))
    folder = Path(settings.run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError(f"--run-dir={folder}: {error.strerror}") from error
    return folder


def _open_disk(
    settings: KvStoreSettings,
    memory: BlockMemory,
    inbox: Events,
    stack: ExitStack,
    kit: FaultKit | None,
    checks: PageChecks | None,
) -> DiskThread | None:
    if settings.disk is None:
        return None
    path, n_bytes = Path(settings.disk), settings.disk_size_bytes
    folder = DiskFolder(path, n_bytes) if kit is None else FaultyDiskFolder(path, n_bytes, kit)
    stack.callback(folder.close)
    thread = DiskThread(folder, memory, inbox.put, checks)
    stack.callback(thread.stop)
    return thread


def _layout(model: str, dtype: str) -> KvLayout:
    from kvstore.server.model_layout import model_layout  # the hub's client takes longer to import than all the rest

    return model_layout(model, dtype)


def _advertised(endpoint: str, host: str | None) -> str:
    """`endpoint` under the host name that others can dial."""
    scheme, _, address = endpoint.partition("://")
    bound, colon, port = address.rpartition(":")
    if scheme != "tcp":
        return endpoint
    if host is None:
        host = platform.node() if bound in _WILDCARDS else bound
    return f"{scheme}://{host}{colon}{port}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
