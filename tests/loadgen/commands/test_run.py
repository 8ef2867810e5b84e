import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from loadgen.__main__ import main
from tests.loadgen.fake_server import Answer, FakeServer, Script, fake_server, steady


def bench(script: Script, *flags: object, models: tuple[str, ...] = ("fake",)) -> tuple[int, FakeServer]:
    """Run the command against a scripted server; exit code and what the server saw."""

    async def talk() -> tuple[int, FakeServer]:
        async with fake_server(script, models) as fake:
            return await asyncio.to_thread(main, ["run", "--url", fake.url, *map(str, flags)]), fake

    return asyncio.run(talk())


FEW = ("--num-requests", 10, "--isl", 5, "--osl", 3)


def test_an_open_loop_run_ends_with_a_table_a_file_and_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    code, fake = bench(steady(cached=1), *FEW, "--rate", 500, "--seed", 0, "--out", out)
    assert code == 0
    assert len(fake.seen) == 10
    assert {len(seen.body["prompt"]) for seen in fake.seen} == {5}
    table = capsys.readouterr().out
    for row in ("Successful requests: +10", "Total input tokens: +50", "Total generated tokens: +30"):
        assert re.search(row, table)
    assert "P99 TTFT (ms): " in table and "needs 200" in table
    found = json.loads((out / "result.json").read_text())
    assert (found["completed"], found["failed"], found["model_id"], found["num_prompts"]) == (10, 0, "fake", 10)
    assert (found["total_input_tokens"], found["total_output_tokens"], found["cached_tokens"]) == (50, 30, 10)
    assert (found["request_rate"], found["max_concurrency"], found["seed"]) == (500.0, None, 0)
    for name in ("ttft", "tpot", "itl", "e2el"):
        assert found[f"mean_{name}_ms"] >= 0  # two tokens may come in one piece
        assert found[f"p99_{name}_ms"] is None
    assert [len(gaps) for gaps in found["itls"]] == [2] * 10
    assert found["start_times"] == sorted(found["start_times"])
    assert any("prefix cache" in warning for warning in found["warnings"])
    assert set(found["send_lag_ms"]) == {"p50", "p99", "max"}


def test_a_closed_loop_chat_run_finds_the_model_itself(tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, fake = bench(steady(), *FEW, "--concurrency", 2, "--endpoint", "chat", "--out", out, "--quiet")
    assert code == 0
    assert {seen.path for seen in fake.seen} == {"/v1/chat/completions"}
    assert {seen.body["model"] for seen in fake.seen} == {"fake"}
    found = json.loads((out / "result.json").read_text())
    assert (found["max_concurrency"], found["request_rate"], found["burstiness"]) == (2, "inf", None)
    assert found["max_concurrent_requests"] <= 2


def test_any_failed_request_makes_the_exit_code_one(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(number: int, body: dict[str, object]) -> Answer:
        return Answer((b"full",), status=503, content_type="text/plain") if number == 3 else steady()(number, body)

    code, _ = bench(broken, *FEW, "--concurrency", 1)
    assert code == 1
    table = capsys.readouterr().out
    assert re.search("Failed requests: +1", table)
    assert re.search("rejected: +1", table)
    assert "error: rejected: HTTP 503: full" in table


def test_cancelled_requests_are_no_failures(capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = bench(steady(), *FEW, "--concurrency", 2, "--cancel-rate", 1)
    assert code == 0
    assert re.search("Cancelled requests: +[1-9]", capsys.readouterr().out)


def test_warm_up_requests_are_sent_and_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    _, fake = bench(steady(), *FEW, "--concurrency", 2, "--warmup", 4)
    assert len(fake.seen) == 14
    assert len({str(seen.body["prompt"]) for seen in fake.seen}) == 14
    assert re.search("Successful requests: +10", capsys.readouterr().out)


def test_short_answers_are_pointed_out(capsys: pytest.CaptureFixture[str]) -> None:
    bench(steady(n_tokens=2), *FEW, "--concurrency", 2)
    assert "10 of 10 answers had another length" in capsys.readouterr().out


def test_a_seed_is_drawn_unless_given() -> None:
    prompts = [str(bench(steady(), *FEW, "--rate", "inf", "--quiet", *seed)[1].seen[0].body["prompt"])
               for seed in ((), (), ("--seed", 3), ("--seed", 3))]  # fmt: skip
    assert prompts[0] != prompts[1]
    assert prompts[2] == prompts[3]


def test_keys_and_headers_are_sent_and_never_written(tmp_path: Path) -> None:
    out = tmp_path / "run"
    secrets = ("--api-key", "sk-1", "--header=x-a=sk-2", "--header", "X-B=sk-3")
    _, fake = bench(steady(), *FEW, "--concurrency", 1, *secrets, "--out", out, "--quiet")
    headers = fake.seen[0].headers
    assert (headers["authorization"], headers["x-a"], headers["x-b"]) == ("Bearer sk-1", "sk-2", "sk-3")
    written = [file.read_text() for file in out.iterdir()]
    assert len(written) == 4
    assert not any("sk-1" in text or "sk-2" in text or "sk-3" in text for text in written)


def test_extra_body_fields_reach_the_server() -> None:
    _, fake = bench(
        steady(), *FEW, "--concurrency", 1, "--extra-body", '{"temperature": 0.5}', "--no-ignore-eos", "--quiet"
    )
    assert fake.seen[0].body["temperature"] == 0.5
    assert "ignore_eos" not in fake.seen[0].body


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ((), "--rate .* --concurrency .* --replay"),
        (("--rate", "1", "--concurrency", "1"), "exactly one"),
        (("--rate", "-1"), "--rate: '-1': must be a number of requests per second above 0"),
        (("--rate", "nan"), "--rate"),
        (("--concurrency", "0"), "--concurrency: '0': must be a whole number, 1 or more"),
        (("--rate", "1", "--isl", "many"), "--isl: 'many': must be a length such as"),
        (("--rate", "1", "--burstiness", "2"), "--arrival gamma"),
        (("--concurrency", "1", "--arrival", "constant"), "needs --rate"),
        (("--rate", "1", "--extra-body", "[1]"), "--extra-body: must be a JSON object"),
        (("--rate", "1", "--goodput", "latency:5"), "ttft:MS"),
        (("--rate", "1", "--goodput", "ttft:fast"), "'fast': must be a number"),
        (("--rate", "1", "--header", "oops"), "--header: must be name=value"),
        (("--rate", "1", "--cancel-rate", "20"), "--cancel-rate: '20': must be between 0 and 1"),
        (("--rate", "1", "--out", "/dev/null/x"), "--out='/dev/null/x': must be a folder"),
        (("--rate", "1", "--rats", "1"), "--rats"),
        (("--rate", "1", "--model", "other"), "--model='other': the server offers fake"),
        (("--rate", "1", "--url", "http://127.0.0.1:1"), "--url='http://127.0.0.1:1': no server there"),
    ],
)
def test_bad_settings_end_with_two_and_say_what_is_wrong(
    flags: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, fake = bench(steady(), *flags)
    assert code == 2
    assert re.search(text, capsys.readouterr().err)
    assert fake.seen == []


def test_several_models_must_be_chosen_from(capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = bench(steady(), *FEW, "--rate", 100, models=("a", "b"))
    assert code == 2
    assert "the server offers a, b" in capsys.readouterr().err


@pytest.mark.system
def test_the_generator_needs_no_torch() -> None:
    code = "import sys, loadgen.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
