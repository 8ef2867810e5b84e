"""`penstock bench report`: folders of results in, one HTML page out."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.errors import ConfigError
from loadgen.commands.guarded import OK, guarded
from loadgen.flags.types import Parser
from loadgen.output.files import is_result, load
from loadgen.output.html.render import render

_NAME = "report.html"


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Write the page and say where. Exit code 0; 2: a folder is no result, or the page cannot be written."""
    return guarded("report", lambda: _report(parser().parse_args(arguments)))


def _report(values: Namespace) -> int:
    folders = result_folders([Path(name) for name in values.folders])
    results = [load(folder) for folder in folders]
    out = Path(values.out) if values.out is not None else default_place(folders)
    title = values.title or _title(folders)
    names = folder_names(folders) if values.names == "folder" and len(folders) > 1 else None
    page = render(results, title, names=names)
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the page cannot be written: {error}") from error
    print(out)
    return OK


def result_folders(given: Sequence[Path]) -> list[Path]:
    """The folders that hold results: those given, or what is in them, as with a sweep. Raises ConfigError."""
    found: list[Path] = []
    for folder in given:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder; give folders that `penstock bench run --out` wrote")
        inner = sorted((path for path in folder.iterdir() if is_result(path)), key=_by_number)
        if is_result(folder):
            found.append(folder)
        elif inner:
            found += inner
        else:
            load(folder)  # says what is wrong with it
    return list(dict.fromkeys(found))


def default_place(folders: Sequence[Path]) -> Path:
    """In the folder of the one result, or beside the folders of several."""
    return folders[0] / _NAME if len(folders) == 1 else folders[0].parent / _NAME


def folder_names(folders: Sequence[Path]) -> list[str]:
    """Their last parts, with the parent's where those alone do not tell them apart."""
    resolved = [folder.resolve() for folder in folders]
    short = [folder.name for folder in resolved]
    return short if len(set(short)) == len(short) else [f"{path.parent.name}/{path.name}" for path in resolved]


def _by_number(path: Path) -> tuple[list[float], str]:
    """`rate-2` before `rate-10`."""
    digits = "".join(letter if letter.isdecimal() or letter == "." else " " for letter in path.name)
    return [float(part) for part in digits.split() if part.count(".") < 2 and part != "."], path.name


def _title(folders: Sequence[Path]) -> str:
    return (folders[0] if len(folders) == 1 else folders[0].parent).resolve().name or "Results"


def parser() -> Parser:
    """Of the command's flags."""
    made = Parser(
        prog="penstock bench report",
        description="One HTML page of one run, or of several side by side. It needs no network and no other file.",
        epilog="Exit code: 0 written, 2 not.",
    )
    made.add_argument("folders", nargs="+", metavar="DIR", help="folder of a run, or of runs, such as a sweep's")
    made.add_argument("--out", metavar="FILE.html", help=f"[{_NAME} in the folder; of several, beside them]")
    made.add_argument("--title", help="heading of the page [name of the folder]")
    made.add_argument("--names", choices=("load", "folder"), default="load", help="what runs are called [%(default)s]")
    return made
