"""Shapes of the data sets that papers measure on, from figures that were published. Nothing is downloaded. Pure.

Most papers print a mean or a range, not a law. How a law was made of it is said by `fit`:
- `mean`: log-normal of deviation 1 (p90 = 3.6 times the median, as in most logs of chats) with the most that is named or,
  where none is, a usual context; the median is chosen so that the mean after clipping is the published one.
- `p50, p90`: log-normal through both, clipped at the published most. Its mean is the law's, not the data's.
- `range`: log-normal whose 0.5th and 99.5th percentiles are the ends, clipped at the upper one.
- `p50, mean`: log-normal with both.
What no source says is called assumed. Figures that were recalled, and not read where this was written, are called so.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from loadgen.workload.options import Options, parse_options


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A named workload: a dataset with options."""

    dataset: str
    options: Mapping[str, str]
    """As they would be typed."""
    source: str
    """Where the figures come from."""
    fit: str
    """How the laws were made of them, and what is assumed."""
    mean_isl_tokens: float | None = None
    """Mean of `isl` as published; None: not published, or not what the law was fitted to."""
    mean_osl_tokens: float | None = None

    def parsed(self) -> Options:
        """The options as values."""
        return parse_options(self.options)


_LONG_ANSWERS_ASSUMED = "answers are not published there: 64 tokens assumed, as these are short answers to questions"

SHAPES: Mapping[str, Shape] = {
    "sharegpt": Shape(
        dataset="multi-turn",
        options={
            "isl": "lognormal:100.7:362.9:1024",
            "osl": "lognormal:211.6:762.1:2048",
            "turns": "1-10",
            "think-time": "exp:1",
        },
        source="MuxServe, ShareGPT: mean prompt 161, answer 337, prompt <= 1024, total <= 2048; "
        "KunServe, ShareGPT: mean prompt 1660",
        fit="mean, of each turn. Turns 1-10 so that a prompt with its history has a mean of 161 + 3 * (161 + 337) = 1655, "
        "reading KunServe's 1660 as prompts with history (inferred). Think time assumed",
        mean_isl_tokens=161,
        mean_osl_tokens=337,
    ),
    "sharegpt-single": Shape(
        dataset="random",
        options={"isl": "lognormal:100.7:362.9:1024", "osl": "lognormal:211.6:762.1:2048"},
        source="MuxServe, ShareGPT: mean prompt 161, answer 337, prompt <= 1024, total <= 2048",
        fit="mean",
        mean_isl_tokens=161,
        mean_osl_tokens=337,
    ),
    "sharegpt-kunserve": Shape(
        dataset="random",
        options={"isl": "lognormal:1447:3121:3700", "osl": "lognormal:228.2:821.9:4096"},
        source="KunServe, ShareGPT: mean prompt 1660, answer 373, most in 4K",
        fit="mean; prompts with deviation 0.6 and at most 3700, since a mean of 1660 leaves less room below 4096",
        mean_isl_tokens=1660,
        mean_osl_tokens=373,
    ),
    "sharegpt-loongserve": Shape(
        dataset="random",
        options={"isl": "lognormal:95.9:466:2300", "osl": "lognormal:211.6:762.1:2048"},
        source="LoongServe, ShareGPT: 4 to 2.3K tokens",
        fit="range; answers as in sharegpt-single",
    ),
    "loogle": Shape(
        dataset="documents",
        options={
            "prefix-len": "lognormal:24000:48000:128000",
            "prefix-groups": "27",
            "share-ratio": "3",
            "isl": "lognormal:24:48:128",
            "osl": "lognormal:24:64:256",
            "turns": "2-4",
        },
        source="MemServe's test on LooGLE: 80 sessions, 250 requests, share ratio 3; LooGLE's paper: documents above "
        "24,000 tokens (recalled)",
        fit="27 documents * 3 sessions = 81 sessions of 3 questions in the mean; spread, questions and answers assumed",
    ),
    "loogle-4k": Shape(
        dataset="documents",
        options={
            "prefix-len": "2500-3500",
            "prefix-groups": "27",
            "share-ratio": "3",
            "isl": "lognormal:24:48:128",
            "osl": "lognormal:24:64:256",
            "turns": "2-4",
        },
        source="as loogle, cut to the 4,096 tokens of MemServe's Llama2-13B",
        fit="document lengths assumed so that three questions fit",
    ),
    "react": Shape(
        dataset="agent",
        options={
            "prefix-len": "2400",
            "isl": "lognormal:20:32:64",
            "osl": "lognormal:48:96:256",
            "observation-len": "lognormal:96:192:512",
            "turns": "2-7",
            "think-time": "lognormal:0.2:1:5",
        },
        source="ReAct on HotpotQA as MemServe uses it; ReAct: six worked examples, up to 7 steps (recalled)",
        fit="all lengths assumed from the shape of those prompts: no card has figures",
    ),
    "burstgpt": Shape(
        dataset="random",
        options={"isl": "lognormal:391.6:1410.7:8192", "osl": "lognormal:159.4:574.3:4096"},
        source="KunServe, BurstGPT: mean prompt 642, answer 262",
        fit="mean",
        mean_isl_tokens=642,
        mean_osl_tokens=262,
    ),
    "longbench": Shape(
        dataset="random",
        options={"isl": "lognormal:3740.1:13472.6:32000", "osl": "lognormal:308:1109.3:4096"},
        source="KunServe, LongBench: mean prompt 5.9K, answer 499",
        fit="mean",
        mean_isl_tokens=5900,
        mean_osl_tokens=499,
    ),
    "l-eval": Shape(
        dataset="random",
        options={"isl": "lognormal:23840:70461:210500", "osl": "64"},
        source="LoongServe, L-Eval: 2.7K to 210.5K tokens",
        fit=f"range; {_LONG_ANSWERS_ASSUMED}",
    ),
    "lv-eval": Shape(
        dataset="random",
        options={"isl": "lognormal:86656:206699:497300", "osl": "64"},
        source="LoongServe, LV-Eval: 15.1K to 497.3K tokens",
        fit=f"range; {_LONG_ANSWERS_ASSUMED}",
    ),
    "lv-eval-vtensor": Shape(
        dataset="random",
        options={"isl": "6000-8000", "osl": "2000-4000"},
        source="vTensor, LV-Eval: cut to 6-8K prompt and 2-4K answer",
        fit="evenly between the ends",
    ),
    "lmsys": Shape(
        dataset="multi-turn",
        options={
            "isl": "lognormal:42.2:151.9:4096",
            "osl": "lognormal:131.7:474.3:2048",
            "turns": "1-3",
            "think-time": "exp:1",
        },
        source="LMSYS-Chat-1M (arXiv 2309.11998): 2.0 turns, 69.5 tokens a prompt, 214.5 an answer (recalled). "
        "Mell uses it with lengths times 10: --scale-isl 10 --scale-osl 10",
        fit="mean; think time assumed",
        mean_isl_tokens=69.5,
        mean_osl_tokens=214.5,
    ),
    "wildchat": Shape(
        dataset="multi-turn",
        options={
            "isl": "lognormal:179.4:646.2:8192",
            "osl": "lognormal:271.1:976.7:4096",
            "turns": "1-4",
            "think-time": "exp:1",
        },
        source="WildChat (arXiv 2405.01470): 2.5 turns, 296 tokens a prompt, 441 an answer (recalled). "
        "Mell uses it with lengths times 10: --scale-isl 10 --scale-osl 10",
        fit="mean; think time assumed",
        mean_isl_tokens=295.6,
        mean_osl_tokens=441.3,
    ),
    "mooncake-conversation": Shape(
        dataset="shared-prefix",
        options={
            "isl": "lognormal:6909:27367:126195",
            "osl": "lognormal:350:597:2000",
            "prefix-share": "0.41",
            "prefix-groups": "64",
            "zipf": "1",
        },
        source="Mooncake's conversation_trace: prompt p50 6,909, p90 27,367, most 126,195; answer 350, 597, 2,000; "
        "36.6 % of blocks hit an endless cache",
        fit="p50, p90. Groups and popularity assumed; the share so that as many requests as the trace has hit as often. "
        "Arrivals and real sharing need the trace itself",
    ),
    "mooncake-synthetic": Shape(
        dataset="shared-prefix",
        options={
            "isl": "lognormal:11587:38596:191378",
            "osl": "lognormal:69:389:893",
            "prefix-share": "0.72",
            "prefix-groups": "64",
            "zipf": "1",
        },
        source="Mooncake's synthetic_trace: prompt p50 11,587, p90 38,596, most 191,378; answer 69, 389, 893; "
        "64.0 % of blocks hit an endless cache",
        fit="as mooncake-conversation; the law's mean prompt is 17,900 where the data's is 15,325",
    ),
    "mooncake-toolagent": Shape(
        dataset="shared-prefix",
        options={
            "isl": "lognormal:5233.9:18853.8:126195",
            "osl": "lognormal:111.3:401:2000",
            "prefix-share": "0.6",
            "prefix-groups": "16",
            "zipf": "1",
        },
        source="Mooncake's toolagent_trace: mean prompt 8,596, answer 182; shares more than conversation_trace",
        fit="mean; the share of 0.6, groups and popularity assumed",
        mean_isl_tokens=8596,
        mean_osl_tokens=182,
    ),
    "azure-code": Shape(
        dataset="random",
        options={"isl": "lognormal:1500:4124:8000", "osl": "lognormal:13:63.6:2000"},
        source="Azure LLM inference trace 2023, code, as Splitwise shows it: prompt p50 1,500, mean 2,048; answer 13, 28 "
        "(recalled)",
        fit="p50, mean; most assumed. The trace has no sharing",
    ),
    "azure-conv": Shape(
        dataset="random",
        options={"isl": "lognormal:1020:1932:14000", "osl": "lognormal:129:460:1500"},
        source="Azure LLM inference trace 2023, conversation, as Splitwise shows it: prompt p50 1,020, mean 1,155; answer "
        "129, 211 (recalled)",
        fit="p50, mean; most assumed. The trace has no sharing",
    ),
}
