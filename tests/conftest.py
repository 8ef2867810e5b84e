"""Fixtures shared by all tests."""

import faulthandler
import gc
import os
import signal
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from common.dump_signal import DumpSignal

if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ["TRITON_INTERPRET"] = "1"  # before anybody imports torch, which imports triton, which reads it then


_SYSTEM_S = 400


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seeds", type=int, metavar="N", help="of every test with a parameter `seed`, its first N only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Random schedules find what they find by their number: `make check` plays some of each law's, `make test` all.

    Whole systems are given more time than all others: where a machine is busy, their start alone can take minutes.
    """
    for item in items:
        if item.get_closest_marker("system") is not None:
            item.add_marker(pytest.mark.timeout(_SYSTEM_S))
    most = config.getoption("--seeds")
    if most is None:
        return
    if most < 1:
        raise pytest.UsageError(f"--seeds {most}: every law needs a seed, so 1 or more")
    left_out = [item for item in items if _place_of_seed(item) >= most]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if _place_of_seed(item) < most]


def _place_of_seed(item: pytest.Item) -> int:
    """Of its test's seeds, which one this is, counted from 0; 0 for a test without a parameter `seed`."""
    call = getattr(item, "callspec", None)
    return 0 if call is None else call.indices.get("seed", 0)


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Thousands of tests and all their modules stay until the end: no collection of garbage need look at them."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(10_000, 20, 20)
        gc.enable()


@pytest.fixture
def dumps() -> Iterator[DumpSignal]:
    """The two signals are heard during this test."""
    before = signal.getsignal(signal.SIGUSR1)
    yield DumpSignal()
    signal.signal(signal.SIGUSR1, before)
    faulthandler.unregister(signal.SIGUSR2)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny random-weight float32 checkpoint of one family, made once per run."""
    made: dict[str, Path] = {}

    def make(family: str = "llama") -> Path:
        from services.worker.model.make import make_model  # torch is slow to import: only who needs it

        if family not in made:
            made[family] = tmp_path_factory.mktemp("models") / family
            make_model("tiny", made[family], family=family, dtype="float32")
        return made[family]

    return make
