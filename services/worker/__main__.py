"""`penstock prefill | decode | mixed`: one worker process. The only place that reads the environment and builds things."""

import contextlib
import os
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Sequence

from common.dump_signal import DumpSignal
from common.errors import EXIT_SUCCEEDED, ConfigError
from common.settings import load, usage
from services.worker.settings import WorkerSettings

_SWITCH_S = 0.0005  # the loop waits so long at the most for the lock that the engine thread holds; 5 ms by default
ROLES = ("prefill", "decode", "mixed")
_SUMMARY = {
    "prefill": "Computes prompts and streams their KV to decode workers.",
    "decode": "Takes prompts over from prefill workers and draws the answers.",
    "mixed": "Computes prompts and answers in one process: the aggregated baseline.",
}


def main(role: str, arguments: Sequence[str]) -> int:
    """Run until SIGTERM or SIGINT, or until a newer life has this one's name, then drain.

    Exit code 0, 2 for a bad setting, or EXIT_SUCCEEDED.
    """
    if "--help" in arguments or "-h" in arguments:
        print(usage(WorkerSettings, f"penstock {role}", _SUMMARY[role]))
        return 0
    try:
        settings = load(WorkerSettings, arguments, os.environ)
        return _run(role, settings)
    except ConfigError as error:
        print(f"penstock {role}: {error}", file=sys.stderr)
        return 2


def _run(role: str, settings: WorkerSettings) -> int:
    from services.worker.build import Worker  # torch takes seconds: not for --help or a bad flag

    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: signals.append(received))
    dumps = DumpSignal()
    threading.excepthook = _end_process
    allow_open_files()
    sys.setswitchinterval(_SWITCH_S)
    with Worker(role, settings) as worker:
        worker.serve(lambda: bool(signals), dumps.take)
        return EXIT_SUCCEEDED if worker.succeeded else 0


def allow_open_files() -> None:
    """Raise the soft limit of open files, often 1024, to the hard one.

    Chunks of device memory travel as descriptors, hundreds at a time to each peer that maps ours and from each whose
    memory we map. The low soft limit protects programs that use `select`, of which we are none.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # a sandbox may forbid it: then fewer peers are mapped at once
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _end_process(failure: threading.ExceptHookArgs) -> None:
    """A thread died of our own bug: without it requests would hang, so the process goes, and its supervisor acts."""
    traceback.print_exception(failure.exc_type, failure.exc_value, failure.exc_traceback)
    sys.stderr.flush()
    os._exit(70)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ROLES:
        sys.exit(f"usage: python -m services.worker {'|'.join(ROLES)} [--flag value ...]")
    sys.exit(main(sys.argv[1], sys.argv[2:]))
