"""What the documents say is there, is there."""

import importlib
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

from common.settings import PREFIX, describe
from services.launcher.cli import find
from services.launcher.commands import COMMANDS, named, settings_classes
from services.launcher.environment import variables

ROOT = Path(__file__).parents[2]
PAGES = [
    page
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md"))
    if ".venv" not in page.parts
]
README = (ROOT / "README.md").read_text()


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def shell_lines(text: str) -> list[str]:
    """Lines of code blocks that name no language."""
    blocks = [block for language, block in re.findall(r"(?ms)^```(\w*)\n(.*?)^```", text) if not language]
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{name(page)} links to {target}"


def test_the_path_of_a_request_names_about_ten_files_in_order() -> None:
    section = README.split("## The path of a request")[1].split("\n## ")[0]
    steps = re.findall(r"(?m)^(\d+)\. \[(.+?)\]\((.+?)\)", section)
    assert [int(number) for number, _, _ in steps] == list(range(1, len(steps) + 1))
    assert 8 <= len(steps) <= 14
    for _, shown, target in steps:
        assert shown == target and (ROOT / target).is_file()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_penstock_command_in_a_document_exists(page: Path) -> None:
    for line in shell_lines(page.read_text()):
        words = shlex.split(line, comments=True)
        programs = [index for index, word in enumerate(words) if Path(word).name == "penstock"]
        for index in programs:
            command = find(words[index + 1 :])
            assert command is not None, f"{name(page)}: {line}"
            _refuse_unknown_flags(command.name, words[index + 1 :], line)


def _refuse_unknown_flags(command: str, words: list[str], line: str) -> None:
    one = next(c for c in COMMANDS if c.name == command)
    if one.settings is None:
        return
    flags = {f"--{setting.flag}" for setting in describe(named(one.settings)).values()}
    for word in words:
        if word.startswith("--"):
            assert word.partition("=")[0] in flags, f"{line}: {word}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_bench_command_in_a_document_is_understood(page: Path) -> None:
    for line in shell_lines(page.read_text()):
        words = shlex.split(line, comments=True)
        if "bench" in words and Path(words[words.index("bench") - 1]).name == "penstock":
            command, *flags = words[words.index("bench") + 1 :]
            module = importlib.import_module(f"loadgen.{'flags' if command == 'run' else 'commands'}.{command}")
            if command in ("run", "sweep"):
                module.parse(flags, {})
            elif command == "paper":
                module.parse(flags)
            else:
                module.parser().parse_args(flags)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_make_target_in_a_document_exists(page: Path) -> None:
    targets = set(re.findall(r"(?m)^([a-z-]+):.*##", (ROOT / "Makefile").read_text()))
    for line in shell_lines(page.read_text()):
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert words[1] in targets, f"{name(page)}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_variable_in_a_document_is_a_setting(page: Path) -> None:
    known = variables(settings_classes()) | {"PENSTOCK_PORTS"}
    used = set(re.findall(rf"{PREFIX}[A-Z_]+", page.read_text()))
    assert used <= known


def test_the_flags_of_the_readme_s_table_exist_with_their_defaults() -> None:
    table = README.split("| flag | of |")[1].split("\n\n")[0]
    known = {variable.removeprefix(PREFIX).lower().replace("_", "-") for variable in variables(settings_classes())}
    for row in table.splitlines()[2:]:
        for flag in re.findall(r"`--([a-z-]+)`", row.split("|")[1]):
            assert flag in known


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    names = {re.split(r"[<>=\[; ]", one)[0].lower() for one in wanted}
    page = (ROOT / "docs/dependencies.md").read_text()
    listed = set(re.findall(r"(?m)^\| ([a-z0-9-]+) \| .{10,} \|$", page)) - {"package"}
    assert listed == names


def test_the_lock_holds_a_version_for_every_dependency_and_names_no_host() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    lock = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in lock)
    locked = {line.split("==")[0].lower().replace("_", "-") for line in lock}
    assert {re.split(r"[<>=\[; ]", one)[0].lower().replace("_", "-") for one in wanted} <= locked


def test_the_licence_is_the_whole_apache_licence() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def test_make_help_lists_every_target() -> None:
    shown = subprocess.run(
        ["make", "-C", str(ROOT), "help"], capture_output=True, text=True, check=True, cwd="/"
    ).stdout
    for target in re.findall(r"(?m)^\.PHONY: (.*)$", (ROOT / "Makefile").read_text())[0].split():
        assert re.search(rf"(?m)^{target} ", shown), target


def test_ci_runs_what_a_person_types() -> None:
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o100
    assert script.read_text().rstrip().endswith(" test")
