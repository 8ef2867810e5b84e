"""eLLM's ladder (arXiv 2506.15155): long prompts in one piece, in memory that the scratch of the longest prompt is part of.

The paper: Llama-3-8B-262K on one A100, vLLM that reserves activations for the longest context; three requests of 128K tokens
decode together instead of one, decode throughput up to 2.32x. Here the context is 8,192 tokens, the prompts have 2,048, and
the budget is such that what the longest step's scratch leaves holds one of them. `chunked` is the falsification: with steps of
512 rows there is little scratch to lend, and the gain must shrink.
"""

from loadgen.papers.experiment import Claim, Experiment, PaperWorkload, System

BUDGET = ("--device-memory", "63MiB", "--host-memory", "0", "--caching", "0", "--max-context-tokens", "8192")
_WHOLE, _CHUNKED = ("--max-step-tokens", "8192"), ("--max-step-tokens", "512")
_SLOS = ("--slo-ttft", "3000", "--slo-tpot", "200")

ELLM = Experiment(
    paper="eLLM (arXiv 2506.15155)",
    workloads=(
        PaperWorkload(
            name="2048 in 128 out",
            flags=("--dataset", "random", "--isl", "2048", "--osl", "128", "--ignore-eos"),
            load=1.3,
        ),
    ),
    systems=(
        System(name="static", cluster="1M", flags=(*BUDGET, *_WHOLE, "--elastic", "static")),
        System(name="+ inflation", cluster="1M", flags=(*BUDGET, *_WHOLE, "--elastic", "kv")),
        System(
            name="+ host buffer",
            cluster="1M",
            flags=(*BUDGET, *_WHOLE, "--elastic", "kv", "--layer-offload", "auto", "--host-buffer", "512MiB"),
        ),
        System(
            name="+ SLO controller",
            cluster="1M",
            flags=(*BUDGET, *_WHOLE, "--elastic", "full", "--host-buffer", "512MiB", *_SLOS),
        ),
        System(name="chunked static", cluster="1M", flags=(*BUDGET, *_CHUNKED, "--elastic", "static")),
        System(name="chunked + inflation", cluster="1M", flags=(*BUDGET, *_CHUNKED, "--elastic", "kv")),
    ),
    capacity_of="static",
    claims=(
        Claim(
            workload="2048 in 128 out",
            base="static",
            other="+ inflation",
            changes={"output_throughput": 2.32},
            note="the paper's best decode throughput, 128K-token prompts on an A100",
        ),
        Claim(workload="2048 in 128 out", base="static", other="+ host buffer", changes={}),
        Claim(workload="2048 in 128 out", base="static", other="+ SLO controller", changes={}),
        Claim(workload="2048 in 128 out", base="chunked static", other="chunked + inflation", changes={}),
    ),
    shown={
        "mean_ttft_ms": "mean TTFT (ms)",
        "p90_ttft_ms": "P90 TTFT (ms)",
        "output_throughput": "tokens/s",
        "attainment": "share within SLOs",
    },
    preset="deep",
    requests=60,
    scale=1.0,
    flags=("--goodput", "ttft:3000", "tpot:200"),
)
