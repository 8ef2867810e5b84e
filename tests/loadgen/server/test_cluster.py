"""Starting a system for a run: it answers, it is told apart from the operator's own, and it is gone afterwards."""

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from common.errors import ConfigError
from loadgen.results.timeline import ServerView
from loadgen.server.api import ServerApi
from loadgen.server.cluster import started
from loadgen.server.cluster_spec import parse_cluster
from loadgen.server.probe import Probe, probe
from loadgen.server.watch import Watch
from tests.support.processes import lives

ONE = parse_cluster("1M")


@pytest.mark.parametrize("flag", ["--mixed", "--port=1", "--redis", "--run-dir=/tmp"])
def test_flags_that_the_cluster_decides_are_refused(flag: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--cluster-flags: --[a-z-]+ is decided by --cluster"):
        with started(ONE, [flag, "1"], tmp_path, {}):
            raise AssertionError("it started")


def systems() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "services.launcher.cli" in child.cmdline()]


async def look(url: str) -> tuple[Probe, ServerView, dict[str, object]]:
    async with ServerApi(url, {}) as api:
        found = await probe(api, "llama")
        async with Watch(api, found) as watch:
            start_s = time.monotonic()
            async with httpx.AsyncClient(timeout=60, verify=False) as client:
                body = {"model": "llama", "prompt": [5] * 40, "max_tokens": 3, "ignore_eos": True}
                headers = {"x-penstock-explain": "1"}
                answer = (await client.post(f"{url}/v1/completions", json=body, headers=headers)).json()
            return found, await watch.finish(start_s), answer


@pytest.mark.system
def test_a_cluster_answers_tells_of_itself_leaks_nothing_and_is_gone(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    flags = ["--model", str(tiny_model("llama")), "--device-memory", "64MiB", "--host-memory", "0"]
    operators = {**os.environ, "PENSTOCK_REDIS": "redis://127.0.0.1:1/0"}
    with started(ONE, flags, tmp_path, operators) as url:
        (up,) = systems()
        processes = [up, *up.children(recursive=True)]
        run_dir = Path(up.cmdline()[up.cmdline().index("--run-dir") + 1])
        found, view, answer = asyncio.run(look(url))
    assert found.is_penstock and found.context_tokens
    assert answer["penstock"]["workers"] == {"prefill": "mixed-0", "decode": "mixed-0"}
    assert [set(sample.workers) for sample in view.samples][-1] == {"mixed-0"}
    assert view.samples[-1].kv_used is not None
    assert view.leak_check is not None and view.leak_check.held == {}
    assert len(processes) >= 4, "up, redis, a worker, a gateway"
    assert not any(lives(one) for one in processes)
    assert not run_dir.exists()
    assert {"up.log", "mixed-0.log", "gateway-0.log"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.system
def test_what_up_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)--cluster 1M: .*exit code 2.*--caching=9.*0, 1, 2 or 3"):
        with started(ONE, ["--caching", "9"], tmp_path, os.environ):
            raise AssertionError("it started")
    assert systems() == []
