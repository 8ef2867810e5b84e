import signal
from collections.abc import Iterator

import pytest

from kvstore.server.__main__ import main


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """`main` takes over signals; the test run needs them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--host-memory", "900TiB"), "--host-memory=900.0 TiB is more than the"),
        (("--host-memory", "much"), "--host-memory='much': must be a size such as"),
        (("--id", "a b"), "--id='a b': must be"),
        (("--bind", "tcp://999.1.1.1:1"), "cannot listen on tcp://999.1.1.1:1"),
        (("--redis", "redis://127.0.0.1:1/0"), "redis='redis://127.0.0.1:1/0' does not answer"),
        (("--model", "/no/such/folder"), "--model=/no/such/folder: no such folder"),
        (("--dtype", "float32"), "--dtype=float32 needs --model"),
        (("--eviction", "fifo"), "must be lru or cost-aware"),
        (("--disk-size", "0"), "--disk-size=0: must be 1 or more"),
        (("--disk", "/proc/no"), "--disk=/proc/no: cannot be used"),
        (("--run-dir", "/proc/no"), "--run-dir=/proc/no"),
        (("--host-mem", "1GiB"), "did you mean --host-memory"),
    ],
)
def test_a_setting_that_cannot_work_stops_the_start_with_its_name(
    flags: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--host-memory", "4MiB", *flags]) == 2
    assert text in capsys.readouterr().err


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "--host-memory  PENSTOCK_HOST_MEMORY  [1024MiB]" in capsys.readouterr().out
