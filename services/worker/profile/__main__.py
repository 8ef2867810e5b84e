"""`penstock profile`: measures what engine steps cost here, for workers that want to know before their first request."""

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from common.errors import ConfigError
from common.settings import load
from services.worker.profile.settings import ProfileSettings


def main(argv: Sequence[str]) -> int:
    """Print the table and write the file. Raises ConfigError, before anything is measured."""
    settings = load(ProfileSettings, argv, os.environ)
    out = None if settings.out is None else Path(settings.out).expanduser()
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise ConfigError(f"--out={settings.out}: must name a file in a folder that exists")
    from services.worker.profile.run import run_profile  # torch takes seconds: not for --help or a bad flag

    with contextlib.suppress(BrokenPipeError):  # the reader of the table has seen enough
        run_profile(settings, out, sys.stdout, sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
