"""Tokens chosen on the device are those that drawing by sorting gives, row by row."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from common.messages.requests import Sampling
from kernels import choose as choose_module
from kernels import reference_ops
from kernels.checks import KernelInputError
from kernels.choose import choose_tokens
from services.worker.engine.drawing import draw_rows

INF = float("inf")


@dataclass(frozen=True)
class Asked:
    """One row's parameters, as float32 holds them."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    chance: float = 0.5


def choose(logits: Tensor, asked: list[Asked], device: torch.device) -> list[int]:
    return choose_tokens(*_arguments(logits, asked, device)).tolist()


def _arguments(logits: Tensor, asked: list[Asked], device: torch.device) -> tuple[Tensor, ...]:
    def column(name: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor([getattr(one, name) for one in asked], dtype=dtype, device=device)

    return (
        logits.to(device),
        column("temperature", torch.float32),
        column("top_k", torch.int32),
        column("top_p", torch.float32),
        column("min_p", torch.float32),
        column("chance", torch.float64),
    )


def drawn_on_the_host(logits: Tensor, asked: list[Asked]) -> list[int]:
    """What the engine does without a device: `drawing.draw_rows` over usable logits, greedy rows apart."""
    largest = torch.finfo(torch.float32).max
    usable = torch.nan_to_num(logits.float().cpu(), nan=-INF, posinf=largest, neginf=-INF)
    tokens: list[int] = []
    for row, one in zip(usable, asked, strict=True):
        if one.temperature < 1e-5:
            tokens.append(int(row.argmax()))
            continue
        sampling = Sampling(
            max_tokens=1, temperature=one.temperature, top_k=one.top_k, top_p=one.top_p, min_p=one.min_p
        )
        tokens += draw_rows(row[None], [sampling], [one.chance])
    return tokens


def as_float32(*values: float) -> list[float]:
    return torch.tensor(values).tolist()


def random_rows(rows: int, vocab: int, seed: int) -> tuple[Tensor, list[Asked]]:
    chance = torch.Generator().manual_seed(seed)

    def one_of(values: list[float]) -> float:
        return values[int(torch.randint(len(values), (), generator=chance))]

    logits = torch.randn(rows, vocab, generator=chance) * 4
    logits[::3] = logits[::3].bfloat16().float()  # with ties
    logits[1::5, : vocab // 2] = -INF
    asked = [
        Asked(
            temperature=one_of(as_float32(0.0, 0.3, 1.0, 2.5)),
            top_k=int(one_of([0, 0, 1, 5, 40])),
            top_p=one_of(as_float32(1.0, 1.0, 0.9, 0.5, 0.01)),
            min_p=one_of(as_float32(0.0, 0.0, 0.01, 0.3, 1.0)),
            chance=float(torch.rand((), generator=chance, dtype=torch.float64)),
        )
        for _ in range(rows)
    ]
    return logits, asked


@pytest.mark.long
@pytest.mark.parametrize(("rows", "vocab"), [(2, 1), (4, 7), (8, 300)])
def test_any_parameters_draw_as_the_host_does(rows: int, vocab: int, device: torch.device) -> None:
    logits, asked = random_rows(rows, vocab, seed=vocab)
    assert choose(logits, asked, device) == drawn_on_the_host(logits, asked)


def places(logits: Tensor, tokens: list[int]) -> list[int]:
    """Where in the order of its row each token lies."""
    ids = logits.float().sort(dim=-1, descending=True, stable=True).indices
    return (ids == torch.tensor(tokens)[:, None]).int().argmax(dim=-1).tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_vocabularies_draw_as_the_host_does(dtype: torch.dtype, device: torch.device) -> None:
    """Up to 2e-6 of the mass, and by one place where top-p ends: exponentials differ in their last bits."""
    logits, asked = random_rows(64, 128256, seed=1)
    logits = logits.to(dtype)
    found = places(logits, choose(logits, asked, device))
    exact = places(logits, drawn_on_the_host(logits, asked))
    assert sum(a == b for a, b in zip(found, exact, strict=True)) > 48
    lowest = [replace(one, chance=max(0.0, one.chance - 2e-6)) for one in asked]
    highest = [replace(one, chance=min(1.0 - 2**-53, one.chance + 2e-6)) for one in asked]
    first, last = (places(logits, drawn_on_the_host(logits, near)) for near in (lowest, highest))
    assert all(a - 1 <= b <= c + 1 for a, b, c in zip(first, found, last, strict=True))


@pytest.mark.long
@pytest.mark.parametrize("programs", [1, 1024])
def test_rows_of_several_tiles_are_whole(programs: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose_module, "_PROGRAMS", programs)
    logits = torch.randn(2, 5000, generator=torch.Generator().manual_seed(3)).bfloat16()
    asked = [Asked(chance=0.83), Asked(top_k=3000, top_p=0.5, chance=0.999)]
    assert choose(logits, asked, device) == drawn_on_the_host(logits, asked)


def test_equal_scores_are_taken_by_rising_id(device: torch.device) -> None:
    asked = [Asked(chance=0.35), Asked(chance=0.5), Asked(top_k=4, chance=0.99), Asked(top_p=0.5, chance=0.99)]
    asked.append(Asked(temperature=0.0))
    assert choose(torch.zeros(5, 10), asked, device) == [3, 5, 3, 4, 0]


def test_min_p_keeps_all_that_are_just_as_likely(device: torch.device) -> None:
    assert choose(torch.tensor([[0.0, 1.0, 1.0]]), [Asked(min_p=1.0, chance=0.9)], device) == [2]


def test_a_tie_at_the_cut_keeps_the_first_ids(device: torch.device) -> None:
    logits = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0]])
    assert choose(logits, [Asked(top_k=3, chance=1 - 2**-53)], device) == [0]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:overflow encountered in subtract")  # of the interpreter: inf is meant
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_any_logits_will_do(temperature: float, device: torch.device) -> None:
    nan = float("nan")
    logits = torch.tensor(
        [[-INF, -INF, -INF], [nan, nan, nan], [nan, 1.0, -INF], [0.0, INF, INF], [-3e38, 3e38, nan], [INF, 0.0, -INF]]
    )
    asked = [Asked(temperature=temperature, top_k=2, top_p=0.5, min_p=0.5)] * len(logits)
    assert choose(logits, asked, device) == drawn_on_the_host(logits, asked) == [0, 0, 1, 1, 1, 0]


def test_the_ends_of_the_distribution(device: torch.device) -> None:
    logits = torch.tensor([[2.0, 5.0, -1.0]]).expand(3, -1)
    almost_one = 1.0 - 2**-53
    asked = [Asked(chance=0.0), Asked(chance=almost_one), Asked(top_p=as_float32(0.9)[0], chance=almost_one)]
    assert choose(logits, asked, device) == [1, 2, 1]


@pytest.mark.long
def test_distances_far_below_one_are_told_apart(device: torch.device) -> None:
    """The first coarse bin is the widest in keys: a distance of 2^-20 and none both lie in it."""
    logits = torch.tensor([[0.0, 2.0**-20, 2.0**-21, 0.0]])
    asked = [Asked(chance=chance) for chance in (0.1, 0.3, 0.6, 0.9)]
    asked += [Asked(top_k=3, chance=0.65), Asked(top_k=3, chance=0.7)]
    assert choose(logits.expand(6, -1), asked, device) == [1, 2, 0, 3, 2, 0]


def test_a_row_is_the_same_in_any_batch(device: torch.device) -> None:
    logits, asked = random_rows(3, 50, seed=9)
    assert choose(logits[[2]], asked[2:], device) == choose(logits, asked, device)[2:]


def test_parameters_apply_to_their_own_row_only(device: torch.device) -> None:
    logits = torch.tensor([[1.0, 0.5, 0.25, 0.0]]).expand(3, -1)
    plain = Asked(chance=0.95)
    assert choose(logits, [plain, replace(plain, top_k=1), replace(plain, temperature=0.0)], device) == [3, 0, 0]


@pytest.mark.parametrize("programs", [1, 1024])
def test_the_likeliest_is_the_first_of_equals(
    programs: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose_module, "_PROGRAMS", programs)
    logits = torch.randn(3, 4500, device=device)
    logits[0, [17 + 2048, 17, 2500]] = 50.0
    logits[1] = -INF
    logits[2, [30, 40]] = INF
    zeros = torch.zeros(3, device=device)
    none = torch.zeros(3, dtype=torch.int32, device=device)
    found = choose_tokens(logits, zeros, none, zeros + 1, zeros, zeros.double())
    assert found.tolist() == [17, 0, 30]


def test_the_reference_draws_as_the_host_does() -> None:
    logits, asked = random_rows(64, 500, seed=4)
    arguments = _arguments(logits, asked, torch.device("cpu"))
    assert reference_ops.choose_tokens(*arguments).tolist() == drawn_on_the_host(logits, asked)


def test_parameters_of_another_dtype_are_refused(device: torch.device) -> None:
    arguments = list(_arguments(torch.zeros(1, 4), [Asked()], device))
    arguments[5] = arguments[5].float()
    with pytest.raises(KernelInputError, match=r"chances: torch.float32, expected torch.float64"):
        choose_tokens(*arguments)


@pytest.mark.gpu
def test_a_captured_graph_draws_from_what_its_inputs_hold_then(device: torch.device) -> None:
    logits, asked = random_rows(8, 3000, seed=5)
    arguments = _arguments(logits, asked, device)
    choose_tokens(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = choose_tokens(*arguments)
    for seed in (6, 7):
        logits, asked = random_rows(8, 3000, seed=seed)
        for held, new in zip(arguments, _arguments(logits, asked, device), strict=True):
            held.copy_(new)
        graph.replay()
        assert tokens.tolist() == choose_tokens(*arguments).tolist()
