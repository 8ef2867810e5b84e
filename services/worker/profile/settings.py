"""Settings of `penstock profile`. Where they mean the same, they are named as a worker's."""

from dataclasses import dataclass

from common.settings import memory_setting, setting
from common.units import GIB, MemoryShare
from services.worker.settings import running_limit, step_tokens_limit


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileSettings:
    """One field per flag; see `penstock profile --help`."""

    model: str = setting(help="Folder or hub id of a model in Hugging Face format.")
    out: str | None = setting(None, help="File to write, for --cost-profile of workers; unset: only the table.")
    quick: bool = setting(False, help="A coarse grid and fewer rounds.")

    device: str = setting("cpu", help="Torch device: cpu, cuda or cuda:N.", allowed="cpu, cuda or cuda:N")
    device_memory: MemoryShare | int = memory_setting(
        1 * GIB,
        flag="device-memory",
        help="KV page memory, as the workers will have; bounds the largest batch measured.",
    )
    dtype: str = setting(
        "auto", choices=("auto", "float32", "bfloat16"), help="Weights and KV; auto takes the checkpoint's own."
    )
    threads: int | None = setting(
        None, help="Compute threads; unset: all cores. Times are taken as they are only by workers with as many."
    )
    max_running: int | None = setting(None, help="Sequences in one step at the most; unset: 64, on a GPU 256.")
    max_step_tokens: int | None = setting(
        None, help="Rows of one step at the most; longer prompts are computed in chunks. Unset: 512, on a GPU 8192."
    )

    @property
    def running_limit(self) -> int:
        """As a worker's."""
        return running_limit(self.max_running, self.device)

    @property
    def step_tokens_limit(self) -> int:
        """As a worker's."""
        return step_tokens_limit(self.max_step_tokens, self.device)

    def __post_init__(self) -> None:
        """Refuse values that cannot work. Raises ValueError."""
        if self.max_running is not None and self.max_running < 1:
            raise ValueError(f"--max-running={self.max_running}: must be 1 or more")
        if self.max_step_tokens is not None and self.max_step_tokens < 16:
            raise ValueError(f"--max-step-tokens={self.max_step_tokens}: must be 16 (one token block) or more")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--threads={self.threads}: must be 1 or more")
