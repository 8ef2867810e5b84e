"""Flags and variables become one frozen object, or an error that names the setting and what is allowed."""

from dataclasses import dataclass

import pytest

from common.errors import ConfigError
from common.settings import bytes_setting, describe, load, memory_setting, setting, usage
from common.units import MIB, MemoryShare


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    name: str = setting(help="Who.")
    port: int = setting(80, help="Where.")
    ratio: float = setting(0.5, help="How much.")
    quiet: bool = setting(False, help="Hush.")
    colour: str = setting("red", choices=("red", "blue"), help="Which.")
    memory_bytes: int = bytes_setting(MIB, flag="memory", help="Budget.")
    room: MemoryShare | int = memory_setting(MemoryShare(80), flag="room", help="Room.")
    note: str | None = setting(None, help="Remark.")

    def __post_init__(self) -> None:
        if self.port == 13:
            raise ValueError("--port=13: brings bad luck")


@dataclass(frozen=True, slots=True, kw_only=True)
class Other:
    depth: int = setting(1, help="Of another process.")


def test_a_flag_wins_over_its_variable_and_both_over_the_default() -> None:
    environ = {"PENSTOCK_NAME": "a", "PENSTOCK_PORT": "81"}
    found = load(Example, ["--port", "82"], environ)
    assert (found.name, found.port, found.ratio) == ("a", 82, 0.5)


def test_equals_sign_and_space_mean_the_same() -> None:
    assert load(Example, ["--name=a=b"], {}) == load(Example, ["--name", "a=b"], {})


@pytest.mark.parametrize(("text", "meant"), [("2MiB", 2 * MIB), ("62.5%", MemoryShare(62.5))])
def test_memory_is_a_size_or_a_share(text: str, meant: MemoryShare | int) -> None:
    assert load(Example, ["--name", "a", "--room", text], {}).room == meant


@pytest.mark.parametrize("arguments", [["--quiet"], ["--quiet", "true"], ["--quiet=1"], ["--quiet", "--port", "1"]])
def test_a_switch_may_stand_alone(arguments: list[str]) -> None:
    assert load(Example, ["--name", "a", *arguments], {}).quiet is True


@pytest.mark.parametrize(
    ("arguments", "environ", "parts"),
    [
        (["--prot", "1"], {}, ["--prot", "--port"]),
        (["stray"], {}, ["stray"]),
        (["--port"], {}, ["--port", "whole number"]),
        (["--port", "soon"], {}, ["--port='soon'", "whole number"]),
        (["--port", "13"], {}, ["bad luck"]),
        (["--colour", "green"], {}, ["--colour='green'", "red or blue"]),
        (["--memory", "1XB"], {}, ["--memory='1XB'", "512MiB"]),
        (["--room", "180%"], {}, ["--room='180%'", "80%"]),
        (["--quiet", "maybe"], {}, ["--quiet='maybe'", "true or false"]),
        ([], {"PENSTOCK_PROT": "1"}, ["PENSTOCK_PROT", "PENSTOCK_PORT"]),
        ([], {"PENSTOCK_RATIO": "half"}, ["PENSTOCK_RATIO='half'", "a number"]),
    ],
)
def test_a_bad_setting_is_named_with_what_is_allowed(
    arguments: list[str], environ: dict[str, str], parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(Example, ["--name", "a", *arguments], environ)
    for part in parts:
        assert part in str(caught.value)


def test_a_missing_required_setting_names_flag_and_variable() -> None:
    with pytest.raises(ConfigError, match=r"--name \(or PENSTOCK_NAME\) is required: Who"):
        load(Example, [], {})


def test_an_empty_variable_counts_as_unset() -> None:
    assert load(Example, ["--name", "a"], {"PENSTOCK_PORT": ""}).port == 80


def test_variables_of_other_programs_are_none_of_our_business() -> None:
    assert load(Example, ["--name", "a"], {"PORT": "1", "PATH": "x"}).port == 80


def test_variables_of_known_processes_may_stand_in_the_same_environment() -> None:
    environ = {"PENSTOCK_DEPTH": "3"}
    with pytest.raises(ConfigError, match="PENSTOCK_DEPTH"):
        load(Example, ["--name", "a"], environ)
    assert load(Example, ["--name", "a"], environ, known=[Other]).name == "a"


def test_help_shows_every_flag_variable_and_default() -> None:
    text = usage(Example, "penstock example", "Shows things.")
    for one in describe(Example).values():
        assert f"--{one.flag}  {one.variable}  [{one.default_text}]" in text
        assert one.help in text
    assert "[required]" in text and "[1MiB]" in text and "[unset]" in text
