"""The subcommands of `penstock`, as data: what each is for, whose settings it reads, and what runs it.

Entries are named, not imported: `penstock gateway` must start where torch is not installed, and `penstock bench` must not
pay for a server's imports. This table is the one place in the tree that names every service.
"""

import importlib
from dataclasses import dataclass
from typing import Any  # Any: an attribute looked up by name has no static type


@dataclass(frozen=True, slots=True)
class Command:
    """One subcommand. `entry` and `settings` are `module:name`."""

    name: str
    summary: str
    entry: str
    settings: str | None = None
    """Settings class; None: the command takes flags alone, explains them itself and reads no variables."""
    role: str | None = None
    """First argument of `entry`, where one program plays several roles."""
    starts_others: bool = False
    """Its children inherit the environment, so the variables meant for them stay in it."""

    @property
    def words(self) -> tuple[str, ...]:
        """What is typed after `penstock`."""
        return tuple(self.name.split())


_WORKER = "services.worker.settings:WorkerSettings"
_RUN_WORKER = "services.worker.__main__:main"

COMMANDS: tuple[Command, ...] = (
    Command(
        "up",
        "Start a whole system on this machine and keep it running until Ctrl-C.",
        "services.launcher.up:main",
        "services.launcher.settings:UpSettings",
        starts_others=True,
    ),
    Command(
        "gateway",
        "HTTP front door: OpenAI-compatible API, routing, streaming. Needs no torch.",
        "gateway.__main__:main",
        "gateway.settings:GatewaySettings",
    ),
    Command("prefill", "Worker that computes prompts and hands their KV over.", _RUN_WORKER, _WORKER, "prefill"),
    Command("decode", "Worker that takes KV over and generates tokens.", _RUN_WORKER, _WORKER, "decode"),
    Command("mixed", "Worker that does both phases itself.", _RUN_WORKER, _WORKER, "mixed"),
    Command(
        "kvstore",
        "Keeper of KV in host memory, one per host.",
        "kvstore.server.__main__:main",
        "kvstore.server.settings:KvStoreSettings",
    ),
    Command(
        "status",
        "Show the workers of a running system, their memory and how KV travels.",
        "services.launcher.status:main",
        "services.launcher.settings:StatusSettings",
    ),
    Command(
        "doctor",
        "Check this machine, and a running system, and say what to change.",
        "services.launcher.doctor:main",
        "services.launcher.settings:DoctorSettings",
    ),
    Command(
        "key make",
        "Write a new secret for --cluster-key: encrypted traffic, and nobody else is heard.",
        "services.launcher.key:main",
    ),
    Command("model make", "Write a small random-weight model in the real format.", "services.worker.model.make:main"),
    Command(
        "profile",
        "Measure what steps of a model cost on this machine, for `--cost-profile` of workers.",
        "services.worker.profile.__main__:main",
        "services.worker.profile.settings:ProfileSettings",
    ),
    Command("bench", "Load a running system and report its latencies.", "loadgen.__main__:main"),
)


def named(name: str) -> Any:
    """The object that `module:name` stands for; imports the module."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def settings_classes() -> list[type]:
    """Every settings class of the system, each once. Their modules are light: none imports torch."""
    return [named(name) for name in dict.fromkeys(c.settings for c in COMMANDS if c.settings is not None)]
