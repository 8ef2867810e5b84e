"""Settings of a worker process (prefill, decode or mixed)."""

from dataclasses import dataclass

from common.leases import LEASE_MS
from common.memory_modes import (
    ADMISSION_RULES,
    ELASTIC_MODES,
    KV_LAYOUTS,
    SPARE_MEMORY,
    parse_layer_offload,
    require_memory_modes,
)
from common.policy.eviction import EVICTION_POLICIES
from common.policy.prefetch import FETCH_POLICIES
from common.process_settings import ProcessSettings, require_process_settings
from common.settings import bytes_setting, memory_setting, setting
from common.transports import require_transport
from common.units import GIB, MemoryShare


def running_limit(asked: int | None, device: str) -> int:
    """Sequences in one step at the most."""
    return asked or (64 if device == "cpu" else 256)


def step_tokens_limit(asked: int | None, device: str) -> int:
    """Rows of one step at the most: a GPU needs many to be busy."""
    return asked or (512 if device == "cpu" else 8192)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings(ProcessSettings):
    """One field per flag; see `penstock decode --help`."""

    model: str = setting(help="Folder or hub id of a model in Hugging Face format.")
    served_model_name: str | None = setting(None, help="Name clients use; unset: the folder's or hub id's last part.")
    id: str | None = setting(None, help="Name of this worker, unique in the cluster; unset: role and a random number.")
    cluster: str = setting("default", help="Processes with the same Redis and cluster name form one system.")
    redis: str = setting("redis://127.0.0.1:6379/0", help="Redis that holds the membership.")
    bind: str = setting("tcp://127.0.0.1:0", help="ZeroMQ address to listen on; port 0 picks a free one.")
    advertise_host: str | None = setting(None, help="Host name that others dial; unset: the one in --bind.")
    run_dir: str | None = setting(None, help="Folder for Unix sockets; unset: a private temporary folder.")

    device: str = setting("cpu", help="Torch device: cpu, cuda or cuda:N.", allowed="cpu, cuda or cuda:N")
    device_memory: MemoryShare | int = memory_setting(
        1 * GIB,
        flag="device-memory",
        help="Hard budget of KV page memory, and with --elastic other than off also of the scratch of steps. A share is of "
        "the memory that is available at the start; on a GPU of all its memory, for everything that this process takes "
        "there.",
    )
    dtype: str = setting(
        "auto", choices=("auto", "float32", "bfloat16"), help="Weights and KV; auto takes the checkpoint's own."
    )
    threads: int | None = setting(None, help="Compute threads of this process; unset: all cores it may use.")
    max_context_tokens: int | None = setting(None, help="Prompt plus output; unset: the model's own limit.")

    kv_layout: str = setting(
        "paged",
        choices=KV_LAYOUTS,
        help="How attention finds K and V. paged: blocks anywhere, gathered by a table; virtual: the blocks of a sequence "
        "are mapped one behind the other, so that each layer reads one plain tensor (vTensor).",
    )
    block_tokens: int | None = setting(
        None,
        help="Tokens of a block, the unit in which KV is kept, shared and moved; equal on all workers that exchange KV. "
        "Unset: 16; with --kv-layout=virtual the fewest whose pages can be mapped one by one.",
    )
    elastic: str = setting(
        "off",
        choices=ELASTIC_MODES,
        help="Who gets --device-memory. off: KV pages, and the scratch of steps is extra; static: the scratch of the largest "
        "step is set aside in it; kv: KV takes what the scratch of a step does not need (eLLM); full: KV also goes to "
        "the host buffer, as far as the SLOs allow.",
    )
    layer_offload: str | int = setting(
        "off",
        parse=parse_layer_offload,
        allowed="off, auto or a number of layers",
        help="How many layers' KV leaves while a prompt that does not fit is computed (LayerKV). Of mixed workers they go to "
        "the host buffer, auto: as many as are hidden behind computing, by what copies and steps were measured to take; of "
        "prefill workers to the decode worker, auto: all.",
    )
    host_buffer_bytes: int | None = bytes_setting(
        None,
        flag="host-buffer",
        help="Host memory for the KV of requests that gave way or are not wholly on the device; unset: as large as the page "
        "memory with --layer-offload or --elastic=full on decode and mixed workers, else none: who gives way is computed again.",
    )
    admission: str = setting(
        "fcfs",
        choices=ADMISSION_RULES,
        help="When a prompt may start beside answers being drawn here. fcfs: when there is room; slo: when those answers "
        "also have the time to spare under --slo-tpot.",
    )
    slo_ttft_ms: float = setting(3000.0, flag="slo-ttft", help="Time to the first token that is promised, ms.")
    slo_tpot_ms: float = setting(200.0, flag="slo-tpot", help="Mean time per token after it that is promised, ms.")
    spare_memory: str = setting(
        "keep",
        choices=SPARE_MEMORY,
        help="Page memory that nobody uses for a while: keep it, or give it back to the system until it is needed.",
    )

    cost_profile: str | None = setting(
        None,
        help="File of `penstock profile` to start the cost model from; unset: it learns from this worker's steps alone.",
    )

    max_running: int | None = setting(None, help="Sequences in one step at the most; unset: 64, on a GPU 256.")
    max_step_tokens: int | None = setting(
        None, help="Rows of one step at the most; longer prompts are computed in chunks. Unset: 512, on a GPU 8192."
    )
    plan_ahead: str = setting(
        "auto",
        choices=("auto", "on", "off"),
        help="Whether the next step is planned while one runs; auto: on a GPU, which would stand idle meanwhile.",
    )
    max_queued: int = setting(1024, help="Requests waiting at the most; one more is refused as busy.")

    caching: int = setting(
        3,
        parse=int,
        allowed="0, 1, 2 or 3",
        help="What is kept for reuse. 0: nothing; 1: prompts, on prefill workers; 2: prompts and answers on decode "
        "workers too, and only missing KV is sent; 3: the KV of answers also goes back to the prefill worker.",
    )
    eviction: str = setting(
        "lru", choices=tuple(EVICTION_POLICIES), help="Which kept block goes first: least recently used, or cheapest."
    )
    kvstore: str = setting("auto", choices=("auto", "off"), help="Whether to use a KV store of the cluster.")
    spill: str = setting(
        "write-through",
        choices=("write-through", "write-back", "selective"),
        help="When a kept block is copied to the KV store: at once, when it must go, or when it was used again.",
    )
    fetch: str = setting(
        "auto",
        choices=FETCH_POLICIES,
        help="When KV is fetched from a KV store or another worker: auto, if that is predicted to be faster than computing "
        "it; always, from two blocks on.",
    )
    on_load_failure: str = setting(
        "recompute", choices=("recompute", "fail"), help="When KV that is being fetched comes late or not at all."
    )
    transfer: str = setting(
        "auto",
        choices=("layer", "request", "aggregated", "auto"),
        help="How KV goes to decode workers: layer by layer while computing, after the prompt, after the prompt with "
        "all layers of a block as one piece; auto takes layer at low load and aggregated at high load.",
    )

    verify_kv: bool = setting(
        False,
        help="Check every page that arrives, from whomever and wherever it was kept, against a checksum before it is used.",
    )
    transport: str = setting(
        "auto",
        choices=("auto", "cuda_ipc", "shm", "tcp"),
        help="How KV travels; auto takes memory that both sides map where the probe succeeds, and tcp elsewhere. "
        "cuda_ipc (between devices) and shm (in host memory): the connection is refused where that does not work.",
    )
    lease_ms: int = setting(LEASE_MS, help="How long a prefill worker may fill granted pages without renewing.")
    drain_s: float = setting(
        20.0, help="Time that requests and leases have to finish when the process is told to stop."
    )
    silent_peer_ms: int = setting(3_000, help="A gateway or peer silent for so long is taken for dead.")
    watchdog_ms: int = setting(
        15_000,
        help="A worker with work in which nothing moved for so long writes its state to the log and gives up the youngest "
        "request that could make room; 0: never.",
    )

    @property
    def running_limit(self) -> int:
        """`max_running`, or what suits the device."""
        return running_limit(self.max_running, self.device)

    @property
    def step_tokens_limit(self) -> int:
        """`max_step_tokens`, or what suits the device."""
        return step_tokens_limit(self.max_step_tokens, self.device)

    def __post_init__(self) -> None:
        """Refuse values that cannot work. Raises ValueError."""
        require_process_settings(self)
        for name in ("max_running", "max_step_tokens", "max_queued", "lease_ms", "silent_peer_ms"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')}={value}: must be 1 or more")
        for flag, value in (("slo-ttft", self.slo_ttft_ms), ("slo-tpot", self.slo_tpot_ms)):
            if not value > 0:
                raise ValueError(f"--{flag}={value}: must be above 0")
        require_memory_modes(
            device=self.device,
            kv_layout=self.kv_layout,
            elastic=self.elastic,
            spare_memory=self.spare_memory,
            block_tokens=self.block_tokens,
        )
        for flag, number in (("drain-s", self.drain_s), ("watchdog-ms", self.watchdog_ms)):
            if number < 0:
                raise ValueError(f"--{flag}={number}: must be 0 or more")
        require_transport(self.transport, self.device)
        if self.caching not in range(4):
            raise ValueError(f"--caching={self.caching}: must be 0, 1, 2 or 3")
        if self.max_step_tokens is not None and self.max_step_tokens < 16:
            raise ValueError(f"--max-step-tokens={self.max_step_tokens}: must be 16 (one token block) or more")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--threads={self.threads}: must be 1 or more")
        if self.device != "cpu" and not self.device.startswith("cuda"):
            raise ValueError(f"--device={self.device!r}: must be cpu, cuda or cuda:N")
