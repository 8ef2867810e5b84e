"""Settings that every serving process has: gateway, workers and KV stores."""

from dataclasses import dataclass

from common.settings import setting


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSettings:
    """The base of their settings classes; each calls `require_process_settings` when it is made."""

    cluster_key: str | None = setting(
        None,
        help="File with the cluster's secret, the same for all its processes: their ZeroMQ traffic is then encrypted, and "
        "whoever does not have it is not heard. Unset: neither.",
    )
    debug_faults: bool = setting(False, help="Let --faults take effect. Never in a system whose answers matter.")
    faults: str | None = setting(
        None, help="What goes wrong on purpose in this process, for tests; refused unless --debug-faults is set."
    )


def require_process_settings(settings: ProcessSettings) -> None:
    """Raise ValueError for values that cannot work."""
    if settings.faults is not None and not settings.debug_faults:
        raise ValueError("--faults (PENSTOCK_FAULTS) is set and --debug-faults is not: give both, or neither")
