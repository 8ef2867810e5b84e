import asyncio
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loadgen.results import health
from tests.loadgen.commands.bench import FEW, bench, requests_of, result_of
from tests.loadgen.fake_server import DONE, Answer, fake_server, steady, text_chunk, usage_chunk
from tests.loadgen.server.pages import status, worker


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
    found = result_of(out)
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
    found = result_of(out)
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
    code, _ = bench(steady(), *FEW, "--concurrency", 2, "--cancel-rate", 0.5, "--seed", 0)
    assert code == 0
    assert re.search("Cancelled requests: +[1-9]", capsys.readouterr().out)


def test_a_run_that_was_answered_nothing_is_a_failure() -> None:
    assert bench(steady(), *FEW, "--concurrency", 2, "--cancel-rate", 1)[0] == 1


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
        (("--rate", "1", "--goodput", "ttft:5", "ttft:6"), "ttft has a target already"),
        (("--rate", "1", "--goodput", "ttft:5", "--goodput", "ttft:6"), "ttft has a target already"),
        (("--rate", "1", "--csv"), "--csv needs --out"),
        (("--rate", "1e9"), "up to 1e.06, or inf"),
        (("--replay",), "needs a trace with times"),
        (("--rate", "1", "--header", "content-length=5"), "set by the generator itself"),
        (("--rate", "1", "--api-key", "a\r\nx: y"), "--api-key .*printable"),
        (("--rate", "1", "--endpoint", "chat", "--prompts", "ids"), "a chat is made of text"),
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


def test_conversations_go_on_with_the_answers_they_got(tmp_path: Path) -> None:
    def numbered(number: int, body: dict[str, object]) -> Answer:
        return Answer((text_chunk("x", [1000 + number]), usage_chunk(len(body["prompt"]), 1), DONE))  # type: ignore[arg-type]

    flags = ("--dataset", "multi-turn", "--turns", 3, "--think-time", 0, "--isl", 4, "--osl", 1)
    code, fake = bench(numbered, *flags, "--concurrency", 1, "--num-requests", 6, "--out", tmp_path / "run", "--quiet")
    assert code == 0
    prompts = [seen.body["prompt"] for seen in fake.seen]
    assert [len(prompt) for prompt in prompts] == [4, 9, 14, 4, 9, 14]
    assert prompts[2][:9] == prompts[1] and prompts[2][9] == 1001
    assert [(one["conversation"], one["turn"]) for one in requests_of(tmp_path / "run")] == [
        (conversation, turn) for conversation in (0, 1) for turn in (0, 1, 2)
    ]


def test_chats_send_the_servers_own_text_back() -> None:
    flags = ("--dataset", "multi-turn", "--turns", 2, "--think-time", 0, "--isl", 4, "--osl", 2)
    _, fake = bench(steady(), *flags, "--endpoint", "chat", "--concurrency", 1, "--num-requests", 2, "--quiet")
    first, second = (seen.body["messages"] for seen in fake.seen)
    assert [message["role"] for message in second] == ["user", "assistant", "user"]
    assert second[0] == first[0] and second[1]["content"] == "xx"


def test_answers_that_nobody_told_the_ids_of_are_pointed_out(capsys: pytest.CaptureFixture[str]) -> None:
    answer = Answer((text_chunk("x"), text_chunk("y"), usage_chunk(4, 2), DONE))
    flags = ("--dataset", "multi-turn", "--turns", 2, "--think-time", 0, "--isl", 4, "--osl", 2)
    bench(lambda number, body: answer, *flags, "--concurrency", 1, "--num-requests", 2, "--no-html")
    assert "1 answers went into later prompts as random tokens" in capsys.readouterr().out


def test_sessions_are_told_if_that_is_asked_for() -> None:
    flags = (*FEW, "--concurrency", 1, "--quiet")
    assert {seen.headers.get("x-session-id") for seen in bench(steady(), *flags)[1].seen} == {None}
    assert len({seen.headers["x-session-id"] for seen in bench(steady(), *flags, "--session-ids")[1].seen}) == 10


def test_only_penstock_is_asked_to_explain() -> None:
    ours = {"/status": lambda: status(worker("m", "mixed"))}
    for pages, asked in ((ours, {"1"}), ({}, {None})):
        _, fake = bench(steady(), *FEW, "--concurrency", 1, "--quiet", "--no-leak-check", pages=pages)
        assert {seen.headers.get("x-penstock-explain") for seen in fake.seen} == asked


def test_a_server_that_keeps_something_fails_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    held = iter([0, 0, *[7] * 1000])  # asked what it is, then what it holds before the run
    pages = {"/status": lambda: status(worker("m", "mixed", pages={"active": next(held)}))}
    code, _ = bench(steady(), *FEW, "--concurrency", 1, "--leak-wait", 0, pages=pages)
    assert code == 1
    assert "still held after the run" in capsys.readouterr().out


def test_a_late_generator_is_an_exit_code_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(health, "_LEAST_LAG_S", 0.0)
    code, _ = bench(steady(), *FEW, "--rate", 1e6, "--arrival", "constant")
    assert code == 3
    assert "the generator was LATE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("completed==10", 0, "met: "),
        ("completed>10", 1, "NOT MET: "),
        ("p99_ttft_ms<1e9", 2, "needs 200 requests"),
        ("p99_itl_ms<1e9", 1, "200"),
        ("completd>1", 2, "completed"),
        ("completed=10", 2, "must be"),
        ("completed<1x", 2, "compare"),
    ],
)
def test_assertions_decide_the_exit_code(text: str, code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(steady(), *FEW, "--rate", "inf", "--assert", text)[0] == code
    shown = capsys.readouterr()
    assert said in shown.out + shown.err


def test_a_cap_says_what_it_held_back(capsys: pytest.CaptureFixture[str]) -> None:
    code, fake = bench(steady(), *FEW, "--rate", "inf", "--max-concurrency", 2)
    assert code == 0
    assert fake.connections <= 3  # one more asks what the server is
    assert re.search(r"Requests held by that maximum: +8, ", capsys.readouterr().out)


def test_the_first_seconds_count_in_throughput_and_in_no_latency(tmp_path: Path) -> None:
    flags = ("--rate", 50, "--arrival", "constant", "--warmup", "0.1s", "--out", tmp_path / "run", "--quiet")
    assert bench(steady(), *FEW, *flags)[0] == 0
    found = result_of(tmp_path / "run")
    assert (found["completed"], found["measured"]) == (10, 5)
    assert [one["measured"] for one in requests_of(tmp_path / "run")] == [False] * 5 + [True] * 5


def test_a_run_of_nothing_but_warm_up_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(steady(), *FEW, "--rate", "inf", "--warmup", "5s")[0] == 2
    assert "leave no request that counts" in capsys.readouterr().err


def test_a_trace_is_replayed_at_its_times(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 40 * n, "input_length": 4, "output_length": 2, "hash_ids": [n]} for n in range(4)]
    trace.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    flags = ("--dataset", "mooncake", "--dataset-path", trace, "--replay", "--trace-speed", 2)
    assert bench(steady(), *flags, "--out", tmp_path / "run", "--quiet")[0] == 0
    planned = [one["planned_s"] for one in requests_of(tmp_path / "run")]
    assert planned == pytest.approx([0.0, 0.02, 0.04, 0.06])


def test_what_does_not_fit_the_context_is_cut_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    card = json.dumps({"data": [{"id": "fake", "max_model_len": 20}]}).encode()
    flags = ("--num-requests", 4, "--isl", 50, "--osl", 4, "--concurrency", 1)
    _, fake = bench(steady(), *flags, pages={"/v1/models": lambda: card})
    assert {len(seen.body["prompt"]) for seen in fake.seen} == {16}
    assert "to fit the context" in capsys.readouterr().out


@pytest.mark.system
def test_several_processes_make_one_result(tmp_path: Path) -> None:
    code, fake = bench(steady(), *FEW, "--rate", 100, "--workers", 2, "--out", tmp_path / "run", "--quiet")
    assert code in (0, 3)  # a busy machine may make it late
    found = result_of(tmp_path / "run")
    assert (found["completed"], len(fake.seen), found["generator"]["processes"]) == (10, 10, 2)
    assert sorted(one["index"] for one in requests_of(tmp_path / "run")) == list(range(10))


def test_files_of_an_older_run_do_not_stay_beside_the_new_ones(tmp_path: Path) -> None:
    flags = (*FEW, "--concurrency", 1, "--out", tmp_path, "--quiet")
    bench(steady(), *flags, "--csv")
    assert {file.name for file in tmp_path.iterdir()} >= {"requests.csv", "report.html"}
    bench(steady(), *flags, "--no-html")
    assert {file.name for file in tmp_path.iterdir()} == {"result.json", "requests.jsonl", "timeline.jsonl"}


def test_what_cannot_be_written_is_shown_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "requests.jsonl").mkdir()
    assert bench(steady(), *FEW, "--concurrency", 1, "--out", tmp_path)[0] == 2
    shown = capsys.readouterr()
    assert re.search("Successful requests: +10", shown.out)
    assert "requests.jsonl" in shown.err


def test_turns_that_arrive_before_the_answer_they_follow_are_pointed_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--dataset", "multi-turn", "--turns", 10, "--isl", 4, "--osl", 1, "--turns-by", "arrivals", "--live", 1)
    bench(steady(), *flags, "--rate", 1e5, "--num-requests", 10, "--no-html")
    assert re.search("of 10 requests arrived before the answer that they follow", capsys.readouterr().out)


def test_lengths_in_words_are_pointed_out(capsys: pytest.CaptureFixture[str]) -> None:
    bench(steady(), *FEW, "--concurrency", 1, "--endpoint", "chat", "--no-html")
    assert "lengths of text prompts are words" in capsys.readouterr().out


def test_a_file_with_fewer_requests_than_asked_for_is_pointed_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "one two", "output_tokens": 2}\n' * 2)
    flags = ("--dataset", "custom", "--dataset-path", file, "--num-requests", 5)
    bench(steady(), *flags, "--concurrency", 1)
    assert "the file has 2 requests, --num-requests asked for 5" in capsys.readouterr().out


@pytest.mark.system
@pytest.mark.parametrize("warmup", [0, 5])
def test_ctrl_c_ends_a_run_with_what_had_been_answered_and_a_warm_up_with_nothing(tmp_path: Path, warmup: int) -> None:
    async def interrupt() -> int:
        hanging = asyncio.Event()

        def two(number: int, body: dict[str, object]) -> Answer:
            if number < 2:
                return steady()(number, body)
            hanging.set()
            return Answer(ending="hang")

        async with fake_server(two) as fake:
            flags = ("--url", fake.url, *FEW, "--concurrency", 1, "--out", tmp_path, "--no-html", "--quiet")
            command = [sys.executable, "-m", "loadgen", "run", *map(str, flags), "--warmup", str(warmup)]
            process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
            await asyncio.wait_for(hanging.wait(), 60)
            process.send_signal(signal.SIGINT)
            await asyncio.wait_for(process.communicate(), 60)
            assert process.returncode is not None
            return process.returncode

    assert asyncio.run(interrupt()) == 130
    if warmup:
        assert list(tmp_path.iterdir()) == []
        return
    found = result_of(tmp_path)
    assert found["completed"] == 2
    assert any("interrupted" in warning for warning in found["warnings"])
