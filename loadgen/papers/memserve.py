"""MemServe's end-to-end experiment (arXiv 2406.17565, section 7): three workloads on three ways to serve.

The paper: Llama2-13B on 8 H800, 4 instances of 2 GPUs; ShareGPT, LooGLE, ReAct on HotpotQA; Poisson arrivals that respect
the order of turns. `mixed` is its PD, `separated` its 1P1D, `separated+caching` its 1P1D-CC; `mixed+caching` is its PD-CC, for which
no figure is quoted here. The rate grid of the paper is not known: here every system gets the same share of what `mixed` can do.
"""

from loadgen.papers.experiment import Claim, Experiment, PaperWorkload, System

_CACHED = ("--caching", "3")
_UNCACHED = ("--caching", "0")

MEMSERVE = Experiment(
    paper="MemServe (arXiv 2406.17565)",
    workloads=(
        PaperWorkload(name="sharegpt", flags=("--shape", "sharegpt")),
        PaperWorkload(name="loogle", flags=("--shape", "loogle-4k")),
        PaperWorkload(name="react", flags=("--shape", "react")),
    ),
    systems=(
        System(name="mixed", cluster="2M", flags=_UNCACHED),
        System(name="mixed+caching", cluster="2M", flags=_CACHED),
        System(name="separated", cluster="1P1D", flags=_UNCACHED),
        System(name="separated+caching", cluster="1P1D", flags=_CACHED),
    ),
    capacity_of="mixed",
    turns_by_arrivals=True,
    flags=("--session-ids",),
    claims=(
        Claim(
            workload="sharegpt",
            base="mixed",
            other="separated",
            changes={"mean_e2el_ms": 0.70, "p99_e2el_ms": 0.58},
        ),
        Claim(
            workload="sharegpt",
            base="separated",
            other="separated+caching",
            changes={"mean_e2el_ms": 0.83, "p99_e2el_ms": 0.71, "mean_ttft_ms": 0.42, "p99_ttft_ms": 0.55},
        ),
        Claim(
            workload="loogle",
            base="mixed",
            other="separated",
            changes={"mean_e2el_ms": 0.897, "p99_e2el_ms": 0.892},
        ),
        Claim(
            workload="loogle",
            base="separated",
            other="separated+caching",
            changes={"mean_e2el_ms": 0.731, "p99_e2el_ms": 0.775, "mean_ttft_ms": 0.438, "p99_ttft_ms": 0.548},
        ),
        Claim(
            workload="react",
            base="mixed",
            other="separated",
            changes={"mean_e2el_ms": None, "p99_e2el_ms": None},
            note="40.8 % / 53.1 %, direction disputed between readers of the paper",
        ),
        Claim(
            workload="react",
            base="separated",
            other="separated+caching",
            changes={"mean_e2el_ms": 0.733, "p99_e2el_ms": 0.786, "mean_ttft_ms": 0.215, "p99_ttft_ms": 0.151},
        ),
    ),
)
