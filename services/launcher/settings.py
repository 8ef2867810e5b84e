"""Settings of the launcher's own commands: up, status and doctor."""

import math
from dataclasses import dataclass

from common.header_key import require_keys
from common.memory_modes import (
    ADMISSION_RULES,
    ELASTIC_MODES,
    KV_LAYOUTS,
    SPARE_MEMORY,
    parse_layer_offload,
    require_host_buffer,
    require_memory_modes,
)
from common.settings import bytes_setting, memory_setting, setting
from common.transports import require_transport
from common.units import GIB, MIB, MemoryShare

_HIGHEST_PORT = 65_535
ROUTING_RULES = ("round-robin", "least-load", "session", "longest-prefix", "predicted-time")
"""As common.policy.routing_rules names them: the launcher starts services, it does not import what they decide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpSettings:
    """One field per flag; see `penstock up --help`. Variables of the services reach the services as they are."""

    model: str | None = setting(
        None, help="Folder or hub id of the model; unset: models/tiny, made with random weights if it is missing."
    )
    served_model_name: str | None = setting(None, help="Name clients use; unset: the folder's or hub id's last part.")
    prefill: int = setting(1, help="Prefill workers.")
    decode: int = setting(1, help="Decode workers.")
    mixed: int = setting(0, help="Workers that do both phases.")
    gateways: int = setting(1, help="Gateways; they listen on --port, --port + 1 and so on.")

    host: str = setting("127.0.0.1", help="Address that the gateways listen on.")
    port: int = setting(8000, help="HTTP port of the first gateway.")
    api_key: str | None = setting(None, help="Key that clients must send as a bearer token; unset: none is needed.")
    api_keys: str | None = setting(
        None,
        help="JSON file of further keys with limits, see gateway/api_keys.py; needs --api-key too, for `up` itself.",
    )
    admin_key: str | None = setting(None, help="Key for /admin; unset: the one of --api-key.")
    redis: str | None = setting(None, help="Redis to use; unset: a private one is started, and stopped at the end.")
    cluster: str = setting("default", help="Processes with the same Redis and cluster name form one system.")

    device: str = setting(
        "cpu", help="Torch device of every worker: cpu, cuda or cuda:N.", allowed="cpu, cuda or cuda:N"
    )
    device_memory: MemoryShare | int = memory_setting(
        1 * GIB,
        flag="device-memory",
        help="Hard budget of KV page memory of each worker; see `penstock decode --help`.",
    )
    host_memory_bytes: int = bytes_setting(
        1 * GIB, flag="host-memory", help="Hard budget of the KV store's host memory; 0: no KV store."
    )
    disk: str | None = setting(None, help="Folder of the KV store's disk tier; unset: none. Made if it is missing.")
    disk_size_bytes: int = bytes_setting(10 * GIB, flag="disk-size", help="Hard budget of the disk tier.")
    dtype: str = setting(
        "auto", choices=("auto", "float32", "bfloat16"), help="Weights and KV; auto takes the checkpoint's own."
    )
    transport: str = setting(
        "auto",
        choices=("auto", "cuda_ipc", "shm", "tcp"),
        help="How KV travels; auto takes shared memory where the probe succeeds.",
    )
    transfer: str = setting(
        "auto",
        choices=("layer", "request", "aggregated", "auto"),
        help="How prompts' KV goes to decode workers; see `penstock prefill --help`.",
    )
    caching: int = setting(
        3,
        parse=int,
        allowed="0, 1, 2 or 3",
        help="What is kept for reuse. 0: nothing; 1: prompts, on prefill workers; 2: prompts and answers on decode "
        "workers too; 3: the KV of answers also goes back to prefill workers.",
    )
    eviction: str = setting(
        "lru", choices=("lru", "cost-aware"), help="Which kept block goes first, on workers and in the KV store."
    )
    spill: str = setting(
        "write-through",
        choices=("write-through", "write-back", "selective"),
        help="When a kept block is copied to the KV store: at once, when it must go, or when it was used again.",
    )
    on_load_failure: str = setting(
        "recompute", choices=("recompute", "fail"), help="When KV from the KV store comes late or not at all."
    )
    route_prefill: str = setting(
        "predicted-time",
        choices=ROUTING_RULES,
        help="Rule that picks who computes prompts; see `penstock gateway --help`.",
    )
    route_decode: str = setting("predicted-time", choices=ROUTING_RULES, help="Rule that picks who draws answers.")
    kv_layout: str = setting(
        "paged", choices=KV_LAYOUTS, help="How attention finds K and V; see `penstock decode --help`."
    )
    block_tokens: int | None = setting(
        None, help="Tokens of a block of KV, on all workers; unset: 16, with --kv-layout=virtual what can be mapped."
    )
    elastic: str = setting(
        "off", choices=ELASTIC_MODES, help="How KV and the scratch of steps share memory; see `penstock decode --help`."
    )
    layer_offload: str | int = setting(
        "off",
        parse=parse_layer_offload,
        allowed="off, auto or a number of layers",
        help="How many layers' KV leaves for the host while a prompt is computed; see `penstock decode --help`.",
    )
    host_buffer_bytes: int | None = bytes_setting(
        None, flag="host-buffer", help="Host memory of each worker for KV that gave way; see `penstock decode --help`."
    )
    admission: str = setting(
        "fcfs", choices=ADMISSION_RULES, help="When a prompt may start beside answers; see `penstock decode --help`."
    )
    slo_ttft_ms: float = setting(3000.0, flag="slo-ttft", help="Time to the first token that is promised, ms.")
    slo_tpot_ms: float = setting(200.0, flag="slo-tpot", help="Mean time per token after it that is promised, ms.")
    spare_memory: str = setting(
        "keep", choices=SPARE_MEMORY, help="Page memory that nobody uses for a while: keep it or give it back."
    )
    max_running: int | None = setting(
        None, help="Sequences in one step of a worker at the most; unset: 64, on a GPU 256."
    )
    max_context_tokens: int | None = setting(None, help="Prompt plus output; unset: the model's own limit.")
    max_step_tokens: int | None = setting(
        None, help="Rows of one step at the most; longer prompts are computed in chunks. Unset: 512, on a GPU 8192."
    )
    threads: int | None = setting(
        None, help="Compute threads of each worker; unset: the cores that may be used, shared out evenly."
    )
    cost_profile: str | None = setting(
        None,
        help="File of `penstock profile` that every worker's cost model starts from; unset: they learn by themselves.",
    )

    verify_kv: bool = setting(
        False, help="Check every page that arrives against a checksum before it is used; see `penstock decode --help`."
    )
    cluster_key: str | None = setting(
        None, help="File with the secret of the cluster, for encrypted traffic; see `penstock gateway --help`."
    )
    debug_faults: bool = setting(False, help="Let PENSTOCK_FAULTS take effect in the processes that are started.")
    retry_wait_s: float = setting(
        30.0,
        help="Time that a request whose worker failed waits for a ready one; longer than a worker's start, as dead ones are restarted.",
    )

    run_dir: str | None = setting(
        None, help="Folder for logs and Unix sockets; unset: a temporary one, removed at the end."
    )
    ready_timeout_s: float = setting(300.0, help="Time that the system has to become ready.")
    drain_s: float = setting(30.0, help="Time that running requests have to finish when the system is told to stop.")

    def __post_init__(self) -> None:
        """Refuse values that cannot work. Raises ValueError."""
        for name in ("prefill", "decode", "mixed"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name}={getattr(self, name)}: must be 0 or more")
        require_memory_modes(
            device=self.device,
            kv_layout=self.kv_layout,
            elastic=self.elastic,
            spare_memory=self.spare_memory,
            block_tokens=self.block_tokens,
        )
        if self.mixed:
            require_host_buffer(
                elastic=self.elastic, layer_offload=self.layer_offload, host_buffer_bytes=self.host_buffer_bytes
            )
        for flag, value in (("slo-ttft", self.slo_ttft_ms), ("slo-tpot", self.slo_tpot_ms)):
            if not value > 0:
                raise ValueError(f"--{flag}={value}: must be above 0")
        if not 0 <= self.retry_wait_s < math.inf:
            raise ValueError(f"--retry-wait-s={self.retry_wait_s}: must be 0 or more, and finite")
        if self.gateways < 1:
            raise ValueError(f"--gateways={self.gateways}: must be 1 or more")
        if bool(self.prefill) != bool(self.decode):
            raise ValueError(
                f"--prefill={self.prefill} --decode={self.decode}: prefill and decode workers need each other; "
                "give both, or neither and --mixed 1"
            )
        if not self.prefill and not self.mixed:
            raise ValueError(
                "--prefill=0 --decode=0 --mixed=0: nobody would compute; give --prefill and --decode, or --mixed"
            )
        if not 1 <= self.port <= _HIGHEST_PORT - self.gateways + 1:
            raise ValueError(
                f"--port={self.port}: must be 1 to {_HIGHEST_PORT - self.gateways + 1} with --gateways={self.gateways}"
            )
        require_keys(api_key=self.api_key, admin_key=self.admin_key)
        if self.api_keys is not None and self.api_key is None:
            raise ValueError(f"--api-keys={self.api_keys}: give --api-key too; `up` looks at its own system with it")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--threads={self.threads}: must be 1 or more")
        if self.caching not in range(4):
            raise ValueError(f"--caching={self.caching}: must be 0, 1, 2 or 3")
        self._refuse_impossible_memory()
        require_transport(self.transport, self.device)
        if not self.ready_timeout_s > 0:
            raise ValueError(f"--ready-timeout-s={self.ready_timeout_s}: must be above 0")
        if self.drain_s < 0:
            raise ValueError(f"--drain-s={self.drain_s}: must be 0 or more")

    def _refuse_impossible_memory(self) -> None:
        if isinstance(self.device_memory, MemoryShare):
            if self.workers * self.device_memory.percent > 100:
                raise ValueError(
                    f"--device-memory={self.device_memory} is for each of {self.workers} workers, together more than there "
                    f"is: give {100 // self.workers}% or less"
                )
        elif self.device_memory < MIB:
            raise ValueError(f"--device-memory={self.device_memory}: must be 1MiB or more")
        if self.host_memory_bytes and self.host_memory_bytes < 2 * MIB:
            raise ValueError(f"--host-memory={self.host_memory_bytes}: must be 2MiB or more, or 0 for no KV store")
        if self.disk is not None and not self.host_memory_bytes:
            raise ValueError(f"--disk={self.disk} needs a KV store; --host-memory=0 means none")

    @property
    def workers(self) -> int:
        """Processes that compute."""
        return self.prefill + self.decode + self.mixed


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusSettings:
    """One field per flag; see `penstock status --help`."""

    url: str = setting("http://127.0.0.1:8000", help="A gateway of the system.")
    api_key: str | None = setting(None, help="Key of the gateway, if it asks for one.")

    def __post_init__(self) -> None:
        """Refuse values that cannot work. Raises ValueError."""
        require_keys(api_key=self.api_key)


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorSettings:
    """One field per flag; see `penstock doctor --help`."""

    url: str | None = setting(
        None,
        help="Also check the running system behind this gateway; what concerns only a system to be started is then left out.",
    )
    api_key: str | None = setting(None, help="Key of the gateway, if it asks for one.")
    redis: str | None = setting(None, help="Also check that this Redis answers.")
    host: str = setting("127.0.0.1", help="Address that the gateway would listen on.")
    port: int = setting(8000, help="Port that the gateway would listen on; not checked with --url.")
    device: str = setting("cpu", help="Torch device that the workers would use; not checked with --url.")
    device_memory: MemoryShare | int = memory_setting(
        1 * GIB, flag="device-memory", help="Page memory that a worker would get; not checked with --url."
    )
    host_memory_bytes: int = bytes_setting(
        1 * GIB, flag="host-memory", help="Memory that a KV store would get, 0: no KV store; not checked with --url."
    )
    disk: str | None = setting(None, help="Folder that a KV store's disk tier would use.")
    disk_size_bytes: int = bytes_setting(10 * GIB, flag="disk-size", help="Budget that the disk tier would get.")
    cluster: str = setting("default", help="Name of the cluster in that Redis.")
    json: bool = setting(False, help="Print findings as one JSON document.")

    def __post_init__(self) -> None:
        """Refuse values that cannot work. Raises ValueError."""
        require_keys(api_key=self.api_key)
