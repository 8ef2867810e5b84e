"""Checkpoints of every family, made once per run, and the parts an engine test needs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from services.worker.engine.torch_options import configure_torch
from services.worker.model.make import FAMILIES, make_model


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    configure_torch(1)
    torch.set_grad_enabled(True)  # the reference models of other tests decide for themselves


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family -> folder of its tiny checkpoint."""
    root = tmp_path_factory.mktemp("checkpoints")
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        assert family in FAMILIES
        if family not in made:
            made[family] = make_model("tiny", root / family, family=family)
        return made[family]

    return folder
