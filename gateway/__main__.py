"""`python -m gateway`: one gateway process. It needs no torch."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

import uvloop

from common.dump_signal import DumpSignal
from common.errors import ConfigError
from common.settings import load, usage
from gateway.process import Gateway
from gateway.settings import GatewaySettings

_SUMMARY = "Speaks OpenAI's API over HTTP and spreads the work over the workers of its cluster."


def main(argv: list[str]) -> int:
    """Exit code: 0 after a stop by signal, 2 for a setting that cannot work (standard error names it)."""
    if "--help" in argv or "-h" in argv:
        sys.stdout.write(usage(GatewaySettings, "penstock gateway", _SUMMARY) + "\n")
        return 0
    try:
        settings = load(GatewaySettings, argv, os.environ)
        dumps = DumpSignal()
        uvloop.run(_run(Gateway(settings), dumps))
    except ConfigError as error:
        sys.stderr.write(f"penstock gateway: {error}\n")
        return 2
    return 0


async def _run(gateway: Gateway, dumps: DumpSignal) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, gateway.ask_to_stop)
    # not as the loop's own signal, which it hears between two callbacks: who is stuck in one must be seen there
    dumps.call(lambda: _soon(loop, gateway.switchboard.write_state))
    await gateway.run()


def _soon(loop: asyncio.AbstractEventLoop, write: Callable[[], None]) -> None:
    with suppress(RuntimeError):  # the loop is closed: the process is at its end
        loop.call_soon_threadsafe(write)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
