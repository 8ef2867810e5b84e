"""Which model a system serves: the one that was named, or a small one with random weights, made on first use."""

import subprocess
from pathlib import Path

from common.errors import ConfigError

DEFAULT_MODEL = Path("models/tiny")


def chosen_model(named: str | None, program: tuple[str, ...], environ: dict[str, str]) -> str:
    """Folder or hub id of the model. Raises ConfigError if a folder is named that is not there or is no model."""
    if named is None:
        return str(_default_model(program, environ))
    folder = Path(named).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"--model={named}: the folder holds no config.json; it must be in Hugging Face format")
        return str(folder.resolve())
    if _looks_like_a_path(named):
        raise ConfigError(
            f"--model={named}: there is no such folder; name a model folder or hub id, "
            f"or make one: penstock model make --preset tiny --out {named}"
        )
    return named


def _looks_like_a_path(named: str) -> bool:
    """A hub id is `owner/name`."""
    return named.startswith((".", "/", "~")) or named.count("/") != 1


def _default_model(program: tuple[str, ...], environ: dict[str, str]) -> Path:
    folder = DEFAULT_MODEL.resolve()
    if (folder / "config.json").is_file():
        return folder
    print(f"making the default model (random weights) in {folder}", flush=True)
    made = subprocess.run(
        [*program, "model", "make", "--preset", "tiny", "--out", str(folder)],
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if made.returncode != 0 and not (folder / "config.json").is_file():  # somebody else may have made it meanwhile
        last = "\n".join(made.stdout.strip().splitlines()[-5:])
        raise ConfigError(f"the default model could not be made in {folder}; name one with --model:\n{last}")
    return folder
