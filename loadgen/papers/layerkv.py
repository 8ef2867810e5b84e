"""LayerKV's overload experiment (arXiv 2410.00428): prompts that wait for KV, by length and load, one worker.

The paper: Llama-2-7B on one L20, 1 request/s, 100 requests per length; TTFT within 3,000 ms, TPOT within 200 ms. The mean
TTFT falls by up to 69x, its P99 by up to 45x: figures of an open loop beyond saturation, which grow with the number of
requests. Here the pool holds 6,144 tokens, so that 2,048-token prompts find room for two at a time, and the rate is a share
of what the worker does when it admits a prompt only with all its layers.
"""

from loadgen.papers.experiment import Claim, Experiment, PaperWorkload, System

OUTPUT_TOKENS = 192
POOL = ("--device-memory", "48MiB", "--host-memory", "0", "--caching", "0", "--max-step-tokens", "2048")
_LAYERS = ("--layer-offload", "auto", "--host-buffer", "1GiB")
_LENGTHS, _LOADS = (256, 1024, 2048), (0.7, 1.5, 3.0)

LAYERKV = Experiment(
    paper="LayerKV (arXiv 2410.00428)",
    workloads=tuple(
        PaperWorkload(
            name=f"{length} tokens at {load:g}",
            flags=("--dataset", "random", "--isl", str(length), "--osl", str(OUTPUT_TOKENS), "--ignore-eos"),
            load=load,
        )
        for length in _LENGTHS
        for load in _LOADS
    ),
    systems=(
        System(name="all layers", cluster="1M", flags=POOL),
        System(name="by layers", cluster="1M", flags=(*POOL, *_LAYERS)),
        System(name="by layers with gate", cluster="1M", flags=(*POOL, *_LAYERS, "--admission", "slo")),
    ),
    capacity_of="all layers",
    claims=tuple(
        Claim(workload=f"{length} tokens at {load:g}", base="all layers", other=other, changes={})
        for length in _LENGTHS
        for load in _LOADS
        for other in ("by layers", "by layers with gate")
    ),
    shown={
        "mean_ttft_ms": "mean TTFT (ms)",
        "p90_ttft_ms": "P90 TTFT (ms)",
        "max_ttft_ms": "longest TTFT (ms)",
        "attainment": "share within SLOs",
        "output_throughput": "tokens/s",
    },
    preset="deep",
    requests=50,
    scale=1.0,
    flags=("--goodput", "ttft:3000", "tpot:200"),
)
