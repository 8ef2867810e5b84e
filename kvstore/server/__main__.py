"""`penstock kvstore`: one KV store process. The only place that reads the environment and builds things."""

import os
import platform
import secrets
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing

from common.errors import ConfigError
from common.ids import Incarnation, WorkerId, peer_id
from common.kv_layout import KvLayout
from common.log import Log
from common.messages.liveness import Member
from common.net.host import kernel_identity
from common.net.redis import Membership
from common.net.sockets import Exchange
from common.settings import load, usage
from common.units import format_bytes
from kvstore.memory.available import available_memory
from kvstore.server.block_memory import BlockMemory
from kvstore.server.core.store import KvStoreCore
from kvstore.server.service import KvStoreService
from kvstore.server.settings import KvStoreSettings

_WILDCARDS = ("0.0.0.0", "*", "[::]")


def main(argv: Sequence[str]) -> int:
    """Run until SIGTERM or SIGINT. Exit code 0, or 2 for a bad setting."""
    if "--help" in argv or "-h" in argv:
        print(
            usage(KvStoreSettings, "penstock kvstore", "Keeps KV blocks in host memory for the workers of a cluster.")
        )
        return 0
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: signals.append(received))
    try:
        _run(load(KvStoreSettings, argv, os.environ), lambda: bool(signals))
    except ConfigError as error:
        print(f"penstock kvstore: {error}", file=sys.stderr)
        return 2
    return 0


def _run(settings: KvStoreSettings, stopping: Callable[[], bool]) -> None:
    worker = WorkerId(settings.id or f"kvstore-{secrets.token_hex(4)}")
    incarnation = Incarnation(secrets.randbits(64))
    log = Log(process="kvstore", id=worker)
    layout = None if settings.model is None else _layout(settings.model, settings.dtype)
    with ExitStack() as stack:
        memory = stack.enter_context(closing(BlockMemory(settings.host_memory_bytes, available_memory())))
        exchange = stack.enter_context(closing(Exchange(peer_id(worker, incarnation), settings.bind)))
        member = Member(
            id=worker,
            role="kvstore",
            incarnation=incarnation,
            endpoint=_advertised(exchange.endpoint, settings.advertise_host),
            host=kernel_identity(),
            pid=os.getpid(),
            model_path=settings.model,
            joined_unix_ms=time.time_ns() // 1_000_000,
        )
        core = KvStoreCore(member, memory.capacity_bytes, layout)
        membership = Membership(settings.redis, settings.cluster, member, lambda members: None)
        membership.join()
        stack.callback(membership.stop)
        log.event(
            "ready",
            endpoint=member.endpoint,
            host_memory=format_bytes(memory.capacity_bytes),
            block_bytes=core.block_bytes,
            blocks=core.capacity_blocks,
        )
        KvStoreService(core, exchange, memory, log).serve(stopping)
        log.event("stopped")


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
