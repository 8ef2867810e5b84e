"""Settings of a KV store process."""

import re
from dataclasses import dataclass

from common.kv_layout import DTYPE_BYTES
from common.policy.eviction import EVICTION_POLICIES
from common.process_settings import ProcessSettings, require_process_settings
from common.settings import bytes_setting, setting
from common.units import GIB

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class KvStoreSettings(ProcessSettings):
    """One field per flag; see `penstock kvstore --help`."""

    id: str | None = setting(None, help="Name of this store, unique in the cluster; unset: kvstore and random digits.")
    cluster: str = setting("default", help="Processes with the same Redis and cluster name form one system.")
    redis: str = setting("redis://127.0.0.1:6379/0", help="Redis that holds the membership.")
    bind: str = setting("tcp://127.0.0.1:0", help="ZeroMQ address to listen on; port 0 picks a free one.")
    advertise_host: str | None = setting(
        None, help="Host name that others dial; unset: the one in --bind, or this host's name if that is 0.0.0.0."
    )

    host_memory_bytes: int = bytes_setting(
        1 * GIB,
        flag="host-memory",
        help="Hard budget of KV memory, taken at start and shared with workers of this host.",
    )
    eviction: str = setting(
        "lru", choices=tuple(EVICTION_POLICIES), help="Which block goes first: least recently used, or cheapest."
    )
    verify_kv: bool = setting(
        False,
        help="Check every page that arrives, from whomever and wherever it was kept, against a checksum before it is used.",
    )
    disk: str | None = setting(
        None, help="Folder for blocks below host memory, this store's alone; unset: none. They outlive a restart."
    )
    disk_size_bytes: int = bytes_setting(10 * GIB, flag="disk-size", help="Hard cap of the files in --disk.")
    run_dir: str | None = setting(None, help="Folder for the Unix socket; unset: a private temporary folder.")
    model: str | None = setting(
        None,
        help="Folder or hub id of the model whose KV is kept; only its config.json is read. "
        "Unset: the first worker that says Hello fixes the layout.",
    )
    dtype: str = setting("auto", choices=("auto", *DTYPE_BYTES), help="Of that KV; auto takes the checkpoint's own.")

    def __post_init__(self) -> None:
        """Refuse values that cannot work. Raises ValueError."""
        require_process_settings(self)
        if self.id is not None and _ID.fullmatch(self.id) is None:
            raise ValueError(f"--id={self.id!r}: must be 1 to 64 letters, digits, dots, dashes or underscores")
        if self.dtype != "auto" and self.model is None:
            raise ValueError(f"--dtype={self.dtype} needs --model")
        if self.disk_size_bytes < 1:
            raise ValueError(f"--disk-size={self.disk_size_bytes}: must be 1 or more")
