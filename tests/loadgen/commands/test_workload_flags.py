import argparse
import json
from pathlib import Path

import pytest

from common.errors import ConfigError
from loadgen.flags.workload import CHOICES, WorkloadSettings, add_workload_flags, workload_settings
from loadgen.ready_workload import describe, describe_source, workload_of
from loadgen.workload.datasets import DATASETS


def settings(*arguments: str, content: str = "ids") -> WorkloadSettings:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_workload_flags(parser)
    return workload_settings(parser.parse_args(arguments), content)


def test_without_flags_the_workload_is_random() -> None:
    found = settings()
    assert found.dataset == "random"
    assert (str(found.options.isl), str(found.options.osl)) == ("128", "64")


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_made_up_dataset_is_built_from_its_name_alone(dataset: str) -> None:
    workload = workload_of(settings("--dataset", dataset), 1, None)
    assert workload.n_conversations is None
    assert workload.conversation(3) == workload_of(settings("--dataset", dataset), 1, None).conversation(3)


def test_a_shape_names_its_dataset_and_typed_options_win() -> None:
    found = settings("--shape", "loogle", "--prefix-len", "100", "--scale-osl", "0.5")
    assert (found.dataset, str(found.options.prefix_len), found.options.share_ratio) == ("documents", "100", 3)
    share = settings("--shape", "mooncake-conversation", "--prefix-len", "64")
    assert share.options.prefix_share is None


def test_a_mix_is_built_of_its_parts() -> None:
    workload = workload_of(settings("--mix", "1:random(isl=4),1:agent"), 1, None)
    assert {workload.conversation(index).group for index in range(20)} == {"random", "agent"}


def test_two_parts_of_a_mix_send_prompts_of_their_own() -> None:
    workload = workload_of(settings("--mix", "1:random(isl=8),1:random(isl=8)"), 1, None)
    prompts = [workload.conversation(index).turns[0].added for index in range(40)]
    assert len(set(prompts)) == 40


def test_words_are_sent_where_words_are_asked_for() -> None:
    workload = workload_of(settings("--isl", "7", content="words"), 1, None)
    added = workload.conversation(0).turns[0].added
    assert isinstance(added, str)
    assert workload.count_tokens(added) == 7


def test_the_context_limit_holds_and_its_cuts_can_be_told() -> None:
    workload = workload_of(settings("--isl", "90", "--osl", "20"), 1, 64)
    assert len(workload.conversation(0).turns[0].added) == 44
    cuts = workload.cuts(10)
    assert cuts is not None
    assert (cuts.trimmed_conversations, cuts.trimmed_tokens) == (10, 460)
    assert workload_of(settings(), 1, None).cuts(10) is None


def test_cancels_fall_within_answers_that_were_shortened_to_fit() -> None:
    workload = workload_of(settings("--osl", "900", "--cancel-rate", "1"), 1, 16)
    points = [workload.conversation(index).turns[0] for index in range(50)]
    assert all((turn.cancel_after_tokens or 0) < turn.output_tokens <= 15 for turn in points)


def test_a_file_becomes_a_workload_with_times_and_notes(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:00.0,50,6\n"
        "2023-11-16 18:00:01.0,0,6\n2023-11-16 18:00:04.0,70,8\n"
    )
    arguments = ("--dataset", "azure", "--dataset-path", str(path), "--trace-speed", "2", "--scale-isl", "0.1")
    workload = workload_of(settings(*arguments), 1, None)
    assert workload.n_conversations == 2
    assert workload.starts_s is not None
    (turn,) = workload.conversation(1).turns
    assert (turn.at_s, len(turn.added), turn.output_tokens) == (2.0, 7, 8)
    assert any("1 rows left out" in note for note in workload.notes)


def test_custom_text_is_sent_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "Why is the sky blue?", "output_tokens": 5}) + "\n")
    workload = workload_of(settings("--dataset", "custom", "--dataset-path", str(path)), 1, None)
    assert workload.conversation(0).turns[0].added == "Why is the sky blue?"
    assert workload.count_tokens("Why is the sky blue?") == 5


def test_a_file_alone_names_its_dataset_and_has_as_many_conversations_as_it_has(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(3 * (json.dumps({"prompt": "Why?"}) + "\n"))
    found = settings("--dataset-path", str(path), "--osl", "7", "--cancel-rate", "0.5")
    assert found.dataset == "custom"
    workload = workload_of(found, 1, 64)
    assert workload.n_conversations == 3
    assert [workload.conversation(index).turns[0].output_tokens for index in range(3)] == [7, 7, 7]
    drawn = settings("--dataset-path", str(path), "--osl", "10-9999")
    seeds = [workload_of(drawn, seed, None).conversation(0).turns[0].output_tokens for seed in (1, 1, 2)]
    assert seeds[0] == seeds[1] != seeds[2]
    assert found.shown()["osl"] == "7"
    assert "osl 7 where it does not say" in describe(found)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--zipf 1", "--zipf: means nothing to dataset random"),
        ("--dataset mooncake --dataset-path f --isl 5", "--isl: means nothing to dataset mooncake"),
        ("--trace-speed 2", "--trace-speed: means nothing"),
        ("--dataset azure --dataset-path f --block 4", "--block: means nothing"),
        ("--dataset sharegpt --dataset-path f --token-ids-from 1-5", "--token-ids-from: means nothing"),
        ("--dataset random --dataset-path f", "--dataset-path: means nothing"),
        ("--dataset-path nowhere", "nowhere: No such file"),
        ("--dataset azure --dataset-path f --osl 5", "--osl: means nothing to dataset azure"),
        ("--dataset custom --dataset-path f --isl 5", "--isl: means nothing to dataset custom"),
        ("--dataset mooncake", "needs --dataset-path"),
        ("--dataset mix", "needs --mix"),
        ("--dataset random --mix 1:agent", "--mix is of dataset mix"),
        ("--dataset random --shape loogle", "--shape=loogle is of dataset documents"),
        ("--shape loogle --mix 1:agent", "inside --mix"),
        ("--mix 1:agent --osl 5", "--osl: means nothing to dataset mix"),
        ("--dataset azure --dataset-path f --trace-start 5 --trace-end 5", "--trace-end=5 must be after"),
    ],
)
def test_flags_that_do_not_go_together_are_refused_by_name(arguments: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settings(*arguments.split())


def test_a_weight_too_small_for_a_mix_is_a_setting_to_change() -> None:
    with pytest.raises(ConfigError, match="--mix: agent"):
        workload_of(settings("--mix", "1:random,0.00001:agent"), 1, None)


@pytest.mark.parametrize("arguments", [(), ("--shape", "react"), ("--mix", "1:agent"), ("--dataset", "documents")])
def test_settings_are_shown_as_json_that_can_be_typed_again(arguments: tuple[str, ...]) -> None:
    found = settings(*arguments)
    shown = json.loads(json.dumps(found.shown()))
    typed = [f"--{name.replace('_', '-')}={value}" for name, value in shown.items() if name != "content"]
    again = settings(*typed)
    assert (again.options, again.change, again.cancel_rate) == (found.options, found.change, found.cancel_rate)
    assert [str(part) for part in again.mix] == [str(part) for part in found.mix]


def test_a_workload_is_described_with_what_it_takes() -> None:
    assert describe(settings("--isl", "5-9", "--cancel-rate", "0.1")) == "random: isl 5-9, osl 64, 10% cancelled"
    assert "in the shape of loogle" in describe(settings("--shape", "loogle"))
    source = describe_source(settings("--shape", "loogle"))
    assert source is not None
    assert "MemServe" in source
    assert "2 times as fast" in describe(settings("--dataset", "azure", "--dataset-path", "f", "--trace-speed", "2"))


def test_every_dataset_of_the_specification_can_be_chosen() -> None:
    wanted = "random shared-prefix multi-turn agent documents mix custom mooncake azure burstgpt sharegpt"
    assert set(CHOICES) == set(wanted.split())
