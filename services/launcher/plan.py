"""Which processes a system consists of, and how each is started. Pure: settings in, commands out."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from common.net.redis_address import has_password
from common.units import MemoryShare, format_bytes
from services.launcher.settings import UpSettings

WORKER_ROLES = ("prefill", "decode", "mixed")


@dataclass(frozen=True, slots=True)
class ProcessPlan:
    """One process."""

    name: str
    role: str
    """prefill, decode, mixed, kvstore, gateway or redis."""
    argv: tuple[str, ...]
    environ: Mapping[str, str] = field(default_factory=dict)
    url: str | None = None
    """Address, where it is known before the start: of a gateway (HTTP) and of Redis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What the launcher found out about the machine before it plans."""

    program: tuple[str, ...]
    """How `penstock` is run."""
    model: str
    redis: str
    run_dir: str
    cores: int

    @property
    def redis_flag(self) -> str | None:
        """The address for a command line, which everybody on the machine can read; None: it goes by environment."""
        return None if has_password(self.redis) else self.redis

    @property
    def redis_environ(self) -> Mapping[str, str]:
        """What `redis_flag` leaves out."""
        return {"PENSTOCK_REDIS": self.redis} if has_password(self.redis) else {}


def plan_processes(settings: UpSettings, site: Site) -> list[ProcessPlan]:
    """Everything but Redis, in the order of starting. Secrets go by environment, the rest by flags."""
    return [
        *([_kvstore(settings, site)] if settings.host_memory_bytes else []),
        *(_worker(settings, site, role, index) for role in WORKER_ROLES for index in range(getattr(settings, role))),
        *(_gateway(settings, site, index) for index in range(settings.gateways)),
    ]


def compute_threads(settings: UpSettings, cores: int) -> int:
    """Threads of each worker: together no more than the cores, since oversubscribed matrix products crawl."""
    return settings.threads or max(1, cores // max(1, settings.workers))


def memory_plan(settings: UpSettings) -> str:
    """How much memory the processes take for KV, and what they keep in it."""
    asked = settings.device_memory
    each = str(asked) if isinstance(asked, MemoryShare) else format_bytes(asked)
    parts = [f"{settings.workers} x {each} on workers"]
    if settings.host_memory_bytes:
        parts.append(f"{format_bytes(settings.host_memory_bytes)} in the KV store")
    if isinstance(asked, MemoryShare):
        lines = [f"KV memory: {' + '.join(parts)}"]
    else:
        total_bytes = settings.workers * asked + settings.host_memory_bytes
        lines = [f"KV memory: {' + '.join(parts)} = {format_bytes(total_bytes)}"]
    if settings.disk is not None:
        lines.append(f"KV on disk: up to {format_bytes(settings.disk_size_bytes)} in {settings.disk}")
    caching = f"caching {settings.caching}, transfer {settings.transfer}, eviction {settings.eviction}"
    spill = f", spill {settings.spill}" if settings.host_memory_bytes else ", no KV store"
    return "\n".join([*lines, f"KV reuse: {caching}{spill}"])


def _flags(**values: object) -> tuple[str, ...]:
    return tuple(
        word
        for name, value in values.items()
        if value is not None
        for word in (f"--{name.replace('_', '-')}", str(value))
    )


def _kvstore(settings: UpSettings, site: Site) -> ProcessPlan:
    flags = _flags(
        id="kvstore-0",
        cluster=settings.cluster,
        redis=site.redis_flag,
        model=site.model,
        dtype=settings.dtype,
        host_memory=settings.host_memory_bytes,
        run_dir=site.run_dir,
        eviction=settings.eviction,
        disk=settings.disk,
        disk_size=None if settings.disk is None else settings.disk_size_bytes,
        verify_kv=settings.verify_kv or None,
        cluster_key=settings.cluster_key,
        debug_faults=settings.debug_faults or None,
    )
    return ProcessPlan("kvstore-0", "kvstore", (*site.program, "kvstore", *flags), site.redis_environ)


def _worker(settings: UpSettings, site: Site, role: str, index: int) -> ProcessPlan:
    threads = compute_threads(settings, site.cores)
    flags = _flags(
        model=site.model,
        served_model_name=settings.served_model_name,
        id=f"{role}-{index}",
        cluster=settings.cluster,
        redis=site.redis_flag,
        run_dir=site.run_dir,
        device=settings.device,
        device_memory=settings.device_memory,
        dtype=settings.dtype,
        transport=settings.transport,
        transfer=settings.transfer,
        caching=settings.caching,
        eviction=settings.eviction,
        kvstore="auto" if settings.host_memory_bytes else "off",
        spill=settings.spill,
        on_load_failure=settings.on_load_failure,
        kv_layout=settings.kv_layout,
        block_tokens=settings.block_tokens,
        elastic=settings.elastic,
        layer_offload=settings.layer_offload,
        host_buffer=None if role == "prefill" else settings.host_buffer_bytes,  # nobody draws answers there
        admission=settings.admission,
        slo_ttft=settings.slo_ttft_ms,
        slo_tpot=settings.slo_tpot_ms,
        spare_memory=settings.spare_memory,
        max_context_tokens=settings.max_context_tokens,
        max_running=settings.max_running,
        max_step_tokens=settings.max_step_tokens,
        drain_s=settings.drain_s,
        threads=threads,
        cost_profile=settings.cost_profile,
        verify_kv=settings.verify_kv or None,
        cluster_key=settings.cluster_key,
        debug_faults=settings.debug_faults or None,
    )
    environ = {
        **site.redis_environ,
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",  # an idle worker must not spin on the cores that its neighbour computes on
        "TOKENIZERS_PARALLELISM": "false",
    }
    return ProcessPlan(f"{role}-{index}", role, (*site.program, role, *flags), environ)


def _gateway(settings: UpSettings, site: Site, index: int) -> ProcessPlan:
    port = settings.port + index
    flags = _flags(
        model=site.model,
        served_model_name=settings.served_model_name,
        id=f"gateway-{index}",
        cluster=settings.cluster,
        redis=site.redis_flag,
        host=settings.host,
        port=port,
        drain_s=settings.drain_s,
        api_keys=settings.api_keys,
        route_prefill=settings.route_prefill,
        route_decode=settings.route_decode,
        retry_wait_s=settings.retry_wait_s,
        cluster_key=settings.cluster_key,
        debug_faults=settings.debug_faults or None,
    )
    keys = {"PENSTOCK_API_KEY": settings.api_key, "PENSTOCK_ADMIN_KEY": settings.admin_key}
    environ = {**site.redis_environ, **{name: key for name, key in keys.items() if key is not None}}
    return ProcessPlan(
        f"gateway-{index}", "gateway", (*site.program, "gateway", *flags), environ, url=http_url(settings.host, port)
    )


def http_url(host: str, port: int) -> str:
    """Address that a client on this machine uses for a server listening on `host`."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
