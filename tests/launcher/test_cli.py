"""The program's front: finds commands, explains them, and lets one environment serve all of them."""

import os
import subprocess
import sys

import pytest

from common.errors import ConfigError
from common.settings import describe
from services.launcher.cli import find, main
from services.launcher.commands import COMMANDS, Command, named, settings_classes
from services.launcher.environment import foreign_variables, variables
from services.launcher.settings import StatusSettings

WITH_SETTINGS = [command for command in COMMANDS if command.settings is not None]


def by_name(command: Command) -> str:
    return command.name


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program takes variables out of its environment: give it one of its own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
    monkeypatch.setattr(os, "environ", clean)


@pytest.mark.parametrize("command", WITH_SETTINGS, ids=by_name)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_shows_flags_variables_and_defaults(
    command: Command, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command.words, flag]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: penstock {command.name} ")
    for one in describe(named(command.settings or "")).values():
        assert f"--{one.flag}  {one.variable}  [{one.default_text}]" in text


@pytest.mark.parametrize("command", COMMANDS, ids=by_name)
def test_the_overview_lists_every_command(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help"]) == 0
    assert f"  {command.name} " in capsys.readouterr().out


def test_help_with_a_command_is_that_command_s_help(capsys: pytest.CaptureFixture[str]) -> None:
    main(["help", "status"])
    asked = capsys.readouterr().out
    main(["status", "--help"])
    assert asked == capsys.readouterr().out


def test_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out.startswith("penstock 0.")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["gatway"], "did you mean 'gateway'?"),
        (["decod", "--model", "x"], "did you mean 'decode'?"),
        (["zzz"], "there are up, gateway,"),
        (["model"], "penstock model make"),
        (["model", "mk"], "penstock model make"),
        ([], "usage: penstock COMMAND"),
    ],
)
def test_an_unknown_command_is_answered_with_what_there_is(
    typed: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(typed) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", WITH_SETTINGS, ids=by_name)
def test_a_bad_flag_stops_every_command_with_its_name(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    if command.role is not None or command.name in ("gateway", "kvstore"):
        pytest.skip("these take over signals and threads of the process; their own tests cover it")
    assert main([*command.words, "--no-such-flag", "1"]) == 2
    assert "--no-such-flag is not a setting" in capsys.readouterr().err


@pytest.mark.parametrize("command", WITH_SETTINGS, ids=by_name)
def test_a_variable_that_nobody_reads_stops_every_command(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    os.environ["PENSTOCK_DEVICE_MEMROY"] = "1GiB"
    assert main([*command.words, "--no-such-flag"]) == 2
    said = capsys.readouterr().err
    assert "PENSTOCK_DEVICE_MEMROY" in said and "PENSTOCK_DEVICE_MEMORY" in said


def test_variables_of_other_processes_are_set_aside() -> None:
    environ = {"PENSTOCK_URL": "u", "PENSTOCK_MAX_RUNNING": "3", "PENSTOCK_PORT": "", "PATH": "p"}
    foreign = foreign_variables(environ, StatusSettings, settings_classes())
    assert foreign == ["PENSTOCK_MAX_RUNNING", "PENSTOCK_PORT"]
    with pytest.raises(ConfigError, match="PENSTOCK_NOBODY"):
        foreign_variables({"PENSTOCK_NOBODY": "1"}, StatusSettings, settings_classes())


def test_a_variable_means_the_same_kind_of_thing_to_everybody() -> None:
    """One environment serves all: a size for one and a name for another would be a trap."""
    meanings: dict[str, set[str]] = {}
    for kind in settings_classes():
        for one in describe(kind).values():
            meanings.setdefault(one.variable, set()).add(one.allowed)
    # The KV store only names the dtype that it keeps, so it takes one more.
    unequal = {name for name, allowed in meanings.items() if len(allowed) > 1} - {"PENSTOCK_DTYPE", "PENSTOCK_DEVICE"}
    assert not unequal
    assert variables(settings_classes()) == set(meanings)


def test_the_longest_name_wins() -> None:
    found = find(["model", "make", "--preset", "tiny"])
    assert found is not None and found.name == "model make"
    assert find(["make"]) is None


@pytest.mark.system
@pytest.mark.parametrize("typed", [["gateway", "--help"], ["bench", "--help"], ["status", "--help"], ["help"]])
def test_commands_that_do_not_compute_start_without_torch(typed: list[str]) -> None:
    script = (
        f"import sys; sys.modules['torch'] = None\nfrom services.launcher.cli import main\nsys.exit(main({typed!r}))"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=100)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.system
def test_a_worker_without_torch_names_the_extra_to_install() -> None:
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from services.launcher.cli import main\n"
        "sys.exit(main(['model', 'make', '--preset', 'tiny', '--out', 'nowhere']))"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=100)
    assert ended.returncode == 2
    assert "penstock[worker]" in ended.stderr


@pytest.mark.parametrize("typed", [["help"], ["up", "--help"], ["version"]])
def test_output_that_nobody_reads_any_more_ends_the_program_quietly(
    typed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `penstock status | head -3` does."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        assert main(typed) == 141
        unread.flush()  # what the interpreter does at its end


def test_another_broken_pipe_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(argv: list[str]) -> int:
        raise BrokenPipeError

    monkeypatch.setattr("services.launcher.status.main", broken)
    with pytest.raises(BrokenPipeError):
        main(["status"])
