"""The part of the kill matrix that every run of the tests does: each victim, each phase, each way to fail. `make faults` does the whole."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.faults.matrix.cells import ALL, CHOSEN, PHASES, VICTIMS, Cell, Got, Mode
from tests.faults.matrix.system import Setup, System, running
from tests.faults.matrix.trial import Asked, Trial
from tests.support.namespaces import network, why_not


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def no_cuts() -> str:
    """Why nothing can be cut here; empty if it can."""
    return why_not()


@pytest.fixture(scope="module")
def system(model: Path, no_cuts: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with ExitStack() as stack:
        net = None if no_cuts else stack.enter_context(network())
        yield stack.enter_context(running(tmp_path_factory.mktemp("logs"), model, Setup(), net))


@pytest.fixture(scope="module")
def asked(model: Path) -> Asked:
    return Asked(model)


@pytest.mark.system
@pytest.mark.parametrize("cell", CHOSEN, ids=str)
def test_everybody_is_answered_serves_on_and_holds_nothing_afterwards(
    cell: Cell, system: System, asked: Asked, no_cuts: str
) -> None:
    if cell.mode is Mode.CUT and no_cuts:
        pytest.skip(f"no network namespaces: {no_cuts}")
    assert Trial(system, asked, cell).run().problems == []


def test_the_chosen_cells_have_every_victim_every_phase_and_every_mode() -> None:
    assert {cell.victim for cell in CHOSEN} == set(VICTIMS)
    assert {cell.phase for cell in CHOSEN} == set(PHASES)
    assert {cell.mode for cell in CHOSEN} == set(Mode)
    assert {cell.victim for cell in CHOSEN if cell.mode is Mode.KILL} == set(VICTIMS)
    assert len(set(CHOSEN)) == len(CHOSEN)


def test_no_cell_allows_wrong_tokens_or_an_answer_from_the_dead() -> None:
    assert all(cell.allowed and Got.WRONG not in cell.allowed for cell in ALL)
    assert all(Got.BROKEN not in cell.allowed for cell in ALL if (cell.victim, cell.mode) != ("gateway", Mode.KILL))
