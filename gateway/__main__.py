"""`python -m gateway`: one gateway process. It needs no torch."""

import asyncio
import os
import signal
import sys

import uvloop

from common.dump_signal import hear_of_hangs, write_stacks
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
        uvloop.run(_run(Gateway(load(GatewaySettings, argv, os.environ))))
    except ConfigError as error:
        sys.stderr.write(f"penstock gateway: {error}\n")
        return 2
    return 0


async def _run(gateway: Gateway) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, gateway.ask_to_stop)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, _dump, gateway)
    hear_of_hangs()
    await gateway.run()


def _dump(gateway: Gateway) -> None:
    write_stacks()
    gateway.switchboard.write_state()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
