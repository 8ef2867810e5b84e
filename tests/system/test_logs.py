"""What processes write to their logs while they start."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.threads import thread_cluster


@pytest.mark.system
def test_each_line_names_its_process_and_a_worker_tells_of_its_model_before_it_has_it(
    tmp_path: Path, tiny_model: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model("llama")
    with thread_cluster(tmp_path) as processes:
        processes.start("kvstore", "store-a", host_memory="4MiB")
        processes.start("mixed", "worker-a", model=model, dtype="float32", device_memory="4MiB")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    said = [(line["process"], line["event"]) for line in lines]
    assert ("store-a", "ready") in said
    loading, loaded = (said.index(("worker-a", event)) for event in ("loading_model", "model_loaded"))
    assert loading < loaded
    assert lines[loading]["folder"] == str(model)
