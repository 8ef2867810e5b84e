"""`penstock bench` against scripted servers, for tests."""

import asyncio
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loadgen.__main__ import main
from tests.loadgen.fake_server import FakeServer, Script, fake_server

Pages = Mapping[str, Callable[[], bytes | int]]
FEW = ("--num-requests", 10, "--isl", 5, "--osl", 3)


def bench(
    script: Script,
    *flags: object,
    command: str = "run",
    models: tuple[str, ...] = ("fake",),
    pages: Pages | None = None,
) -> tuple[int, FakeServer]:
    """Run a command against a scripted server; exit code and what the server saw."""

    async def talk() -> tuple[int, FakeServer]:
        async with fake_server(script, models) as fake:
            fake.pages.update(pages or {})
            return await asyncio.to_thread(main, [command, "--url", fake.url, *map(str, flags)]), fake

    return asyncio.run(talk())


def result_of(folder: Path) -> dict[str, Any]:
    """A run's numbers."""
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def requests_of(folder: Path) -> list[dict[str, Any]]:
    """A run's requests."""
    return [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
