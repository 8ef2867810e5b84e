"""The `penstock` program, also `python -m services.launcher.cli`: finds the subcommand, checks the environment, hands over.

Exit codes: 0 done, 1 failed while running, 2 a setting must be changed.
"""

import difflib
import os
import select
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from common.errors import ConfigError
from common.settings import usage
from services.launcher.commands import COMMANDS, Command, named, settings_classes
from services.launcher.environment import foreign_variables

_EXIT_SETTING = 2
_EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
_EXIT_UNREAD = 141  # 128 + SIGPIPE, likewise
_HELP_FLAGS = {"--help", "-h"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code. Ends quietly if whoever read its output, such as `head`, has enough."""
    try:
        code = _run(argv)
        sys.stdout.flush()  # here, where it can be told, and not when the interpreter ends
    except BrokenPipeError:
        if _is_read():
            raise  # another pipe: a bug of ours
        return _EXIT_UNREAD
    return code


def _is_read() -> bool:
    """Whether anybody reads what is printed. If not, the rest of it goes nowhere, also at the interpreter's end."""
    printed = sys.stdout.fileno()
    poll = select.poll()
    poll.register(printed, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return True
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, printed)
    os.close(nowhere)
    return False


def _run(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = find(arguments)
    if command is None:
        return _without_command(arguments)
    rest = arguments[len(command.words) :]
    try:
        if command.settings is not None:
            kind = named(command.settings)
            if _HELP_FLAGS.intersection(rest):
                print(usage(kind, f"penstock {command.name}", command.summary))
                return 0
            _sort_out_environment(command, kind)
        return _start(command, rest)
    except ConfigError as error:
        print(f"penstock {command.name}: {error}", file=sys.stderr)
        return _EXIT_SETTING
    except KeyboardInterrupt:  # before the command took the signal over
        return _EXIT_INTERRUPTED


def find(arguments: Sequence[str]) -> Command | None:
    """The subcommand that the first words name; None if there is none of that name."""
    for command in COMMANDS:
        if tuple(arguments[: len(command.words)]) == command.words:
            return command
    return None


def _start(command: Command, arguments: Sequence[str]) -> int:
    try:
        entry = named(command.entry)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "safetensors"):
            raise
        raise ConfigError(
            f"{error.name} is not installed; this command computes, so install the worker extra: penstock[worker]"
        ) from error
    result = entry(arguments) if command.role is None else entry(command.role, arguments)
    return int(result)


def _sort_out_environment(command: Command, kind: type) -> None:
    """One environment may serve every process: refuse what nobody knows, then drop what is meant for others."""
    foreign = foreign_variables(os.environ, kind, settings_classes())
    if not command.starts_others:
        for variable in foreign:
            del os.environ[variable]


def _without_command(arguments: Sequence[str]) -> int:
    word = arguments[0] if arguments else ""
    if word in {"help", *_HELP_FLAGS}:
        topic = find(arguments[1:])
        if topic is not None:
            return _run([*topic.words, "--help"])
        print(overview(COMMANDS))
        return 0
    if word in {"version", "--version"}:
        print(f"penstock {version('penstock')}")
        return 0
    if not word:
        print(overview(COMMANDS), file=sys.stderr)
        return _EXIT_SETTING
    print(f"penstock: {_unknown(arguments)}", file=sys.stderr)
    return _EXIT_SETTING


def _unknown(arguments: Sequence[str]) -> str:
    names = [command.name for command in COMMANDS] + ["help", "version"]
    if longer := [name for name in names if name.startswith(f"{arguments[0]} ")]:
        return f"{arguments[0]!r} needs a second word: penstock {longer[0]}"
    near = difflib.get_close_matches(arguments[0], names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
    return f"{arguments[0]!r} is not a command; {hint}"


def overview(commands: Sequence[Command]) -> str:
    """The list of subcommands, for people."""
    rows: Mapping[str, str] = {
        **{command.name: command.summary for command in commands},
        "version": "Print the version.",
        "help COMMAND": "Show a command's flags, variables and defaults; so does COMMAND --help.",
    }
    width = max(len(name) for name in rows)
    lines = [f"  {name.ljust(width)}  {summary}" for name, summary in rows.items()]
    return "\n".join(["usage: penstock COMMAND [--flag value ...]", "", *lines])


if __name__ == "__main__":
    sys.exit(main())
