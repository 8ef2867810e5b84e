"""`penstock bench COMMAND`, also `python -m loadgen COMMAND`."""

import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence

_COMMANDS = {
    "run": "measure a server under load: latency and throughput as its clients see them",
    "sweep": "measure it at several rates, or find the highest rate that meets its targets",
    "compare": "two runs side by side, with intervals; fail unless assertions hold",
    "report": "one HTML page about runs that were written with --out",
    "trace": "look into, convert, scale or make traces of requests",
    "paper": "repeat a paper's experiment here, beside its own figures",
}


def main(argv: Sequence[str]) -> int:
    """Run one command with its flags; returns the exit code."""
    name = argv[0] if argv else "--help"
    if name in ("--help", "-h"):
        print(_help())
        return 0 if argv else 2
    if name not in _COMMANDS:
        print(f"penstock bench: {name!r} is no command\n\n{_help()}", file=sys.stderr)
        return 2
    if threading.current_thread() is threading.main_thread():  # nobody else may
        signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))  # as orderly as Ctrl-C
    # One command's imports are not paid for by the others.
    entry: Callable[[Sequence[str], Mapping[str, str]], int] = importlib.import_module(f"loadgen.commands.{name}").main
    return entry(argv[1:], os.environ)


def _help() -> str:
    lines = [f"  {name:10} {text}" for name, text in _COMMANDS.items()]
    return "\n".join(["usage: penstock bench COMMAND ...; each explains itself with --help", "", *lines])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
