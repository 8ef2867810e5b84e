"""Fixtures shared by all tests."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ["TRITON_INTERPRET"] = "1"  # before anybody imports torch, which imports triton, which reads it then


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny random-weight float32 checkpoint of one family, made once per run."""
    made: dict[str, Path] = {}

    def make(family: str = "llama") -> Path:
        from services.worker.model.make import make_model  # torch is slow to import: only who needs it

        if family not in made:
            made[family] = tmp_path_factory.mktemp("models") / family
            make_model("tiny", made[family], family=family, dtype="float32")
        return made[family]

    return make
