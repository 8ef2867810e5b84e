"""Settings of a gateway process."""

import math
import re
from dataclasses import dataclass

from common.header_key import require_keys
from common.policy.routing_rules import RULES
from common.process_settings import ProcessSettings, require_process_settings
from common.settings import bytes_setting, setting
from common.units import MIB

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings(ProcessSettings):
    """One field per flag; see `penstock gateway --help`."""

    model: str = setting(help="Folder or hub id of a model in Hugging Face format; only its small files are read.")
    served_model_name: str | None = setting(None, help="Name clients use; unset: the folder's or hub id's last part.")
    id: str | None = setting(
        None, help="Name of this gateway, unique in the cluster; unset: gateway and random digits."
    )
    cluster: str = setting("default", help="Processes with the same Redis and cluster name form one system.")
    redis: str = setting("redis://127.0.0.1:6379/0", help="Redis that holds the membership.")

    host: str = setting("127.0.0.1", help="Address to listen on for HTTP.")
    port: int = setting(8000, help="Port to listen on for HTTP; 0 picks a free one.")
    advertise_host: str | None = setting(None, help="Host name in the membership; unset: the one in --host.")
    api_key: str | None = setting(None, help="Key that clients must send as a bearer token; unset: none is needed.")
    max_body_bytes: int = bytes_setting(4 * MIB, flag="max-body", help="Largest request body.")

    request_timeout_s: float = setting(600.0, help="Time a request has from its arrival to its last token.")
    max_inflight: int = setting(1024, help="Prompts that are with workers at the most; more wait, see --max-waiting.")
    default_max_tokens: int | None = setting(
        None,
        help="Answer length where the client gives none; unset: 16 for completions, the rest of the context for chat.",
    )
    max_waiting: int = setting(
        1024, help="Prompts that may wait for one of the places of --max-inflight, most urgent first; 0: none may."
    )
    max_wait_s: float = setting(30.0, help="Time after which a waiting prompt is refused as busy.")
    api_keys: str | None = setting(None, help="JSON file of further keys with limits; see gateway/api_keys.py.")
    admin_key: str | None = setting(
        None,
        help="Key for /admin; unset: the one of --api-key; without either /admin is open on loopback addresses only.",
    )

    route_prefill: str = setting("predicted-time", choices=tuple(RULES), help="Rule that picks who computes prompts.")
    route_decode: str = setting("predicted-time", choices=tuple(RULES), help="Rule that picks who draws answers.")
    route_gate: float = setting(
        1.0,
        help="session and longest-prefix pass over workers that are more than 1 + this times as loaded as the least loaded.",
    )
    local_prefill_tokens: int = setting(
        16, help="A decode worker that lacks no more than so many tokens of a prompt computes them itself; 0: never."
    )
    prefill_fallback: str = setting(
        "allow",
        choices=("allow", "deny"),
        help="Whether decode workers compute prompts while no prefill worker is ready.",
    )
    peer_fetch: str = setting(
        "auto", choices=("auto", "off"), help="Whether workers fetch prefixes from each other where that is faster."
    )
    attempts: int = setting(
        4,
        help="How often a request is tried without a new token, on other workers where possible; each new token begins the"
        " count again. 1: once, and nothing is replayed.",
    )
    retry_wait_s: float = setting(6.0, help="Time that a request whose worker failed waits for a ready one.")
    breaker_failures: int = setting(5, help="Failures in a row after which a worker is passed over; 0: never.")
    breaker_open_s: float = setting(10.0, help="Time until a worker that is passed over is tried again.")
    silent_worker_ms: int = setting(3_000, help="A worker silent for so long is taken for dead.")
    drain_s: float = setting(30.0, help="Time that running requests have to finish when the process is told to stop.")
    log_requests: bool = setting(True, help="Write one log line, event `request`, for every request for an answer.")

    def __post_init__(self) -> None:
        """Refuse values that cannot work. Raises ValueError."""
        require_process_settings(self)
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port={self.port}: must be 0 to 65535")
        if self.id is not None and _ID.fullmatch(self.id) is None:
            raise ValueError(f"--id={self.id!r}: must be 1 to 64 letters, digits, dots, dashes or underscores")
        require_keys(api_key=self.api_key, admin_key=self.admin_key)
        for flag, value in (
            ("max-body", self.max_body_bytes),
            ("max-inflight", self.max_inflight),
            ("default-max-tokens", 1 if self.default_max_tokens is None else self.default_max_tokens),
            ("attempts", self.attempts),
        ):
            if value < 1:
                raise ValueError(f"--{flag}={value}: must be 1 or more")
        if not self.request_timeout_s > 0:
            raise ValueError(f"--request-timeout-s={self.request_timeout_s}: must be above 0")
        for flag, number in (
            ("drain-s", self.drain_s),
            ("max-waiting", self.max_waiting),
            ("max-wait-s", self.max_wait_s),
            ("route-gate", self.route_gate),
            ("local-prefill-tokens", self.local_prefill_tokens),
            ("retry-wait-s", self.retry_wait_s),
            ("breaker-failures", self.breaker_failures),
            ("breaker-open-s", self.breaker_open_s),
        ):
            if not 0 <= number < math.inf:
                raise ValueError(f"--{flag}={number}: must be 0 or more, and finite")
        if self.silent_worker_ms < 1_000:
            raise ValueError(f"--silent-worker-ms={self.silent_worker_ms}: must be 1000 or more, two Pings")
