"""vTensor's end-to-end comparison (arXiv 2407.15309, section 5): blocks gathered by a table against one mapped range.

The paper: Yi models on A100, vLLM 0.4.2's paged kernels; single-turn LV-Eval, multi-turn chat, forks of a shared prefix; 1.86x on
average and 2.42x at best. A closed loop of 16: what counts is tokens per second. `large blocks` is paged with the blocks that
the virtual layout must have, so that the two reasons for a difference (how attention reads, what can be shared) stay apart.
"""

from loadgen.papers.experiment import Claim, Experiment, PaperWorkload, System

_MEMORY = ("--device-memory", "512MiB", "--host-memory", "0")
_LARGE = ("--block-tokens", "64")
_CONCURRENCY = ("--concurrency", "16")
_NAMES = ("single turn", "multi-turn", "shared prefix")

VTENSOR = Experiment(
    paper="vTensor (arXiv 2407.15309)",
    workloads=(
        PaperWorkload(
            name="single turn", flags=("--dataset", "random", "--isl", "1024", "--osl", "256", "--ignore-eos")
        ),
        PaperWorkload(
            name="multi-turn",
            flags=(
                "--dataset",
                "multi-turn",
                "--prefix-len",
                "512",
                "--isl",
                "96",
                "--osl",
                "128",
                "--turns",
                "4",
                "--think-time",
                "0",
                "--ignore-eos",
            ),
        ),
        PaperWorkload(
            name="shared prefix",
            flags=(
                "--dataset",
                "shared-prefix",
                "--prefix-len",
                "1024",
                "--prefix-groups",
                "4",
                "--isl",
                "64",
                "--osl",
                "128",
                "--ignore-eos",
            ),
        ),
    ),
    systems=(
        System(name="paged", cluster="1M", flags=_MEMORY),
        System(name="paged large blocks", cluster="1M", flags=(*_MEMORY, *_LARGE)),
        System(name="virtual", cluster="1M", flags=(*_MEMORY, *_LARGE, "--kv-layout", "virtual")),
    ),
    capacity_of="paged",
    claims=tuple(
        Claim(workload=name, base=base, other="virtual", changes={"output_throughput": stated})
        for name, stated in zip(_NAMES, (1.8, 2.42, 2.0), strict=True)
        for base in ("paged", "paged large blocks")
    ),
    shown={
        "output_throughput": "tokens/s",
        "mean_ttft_ms": "mean TTFT (ms)",
        "p90_ttft_ms": "P90 TTFT (ms)",
    },
    preset="deep",
    requests=128,
    scale=1.0,
    rhythm=_CONCURRENCY,
)
