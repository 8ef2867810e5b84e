"""What tests of workloads build: datasets by their options as text, and whole prompts."""

from dataclasses import replace

from loadgen.workload.content import ContentSource
from loadgen.workload.datasets import DATASETS, Origin, complete
from loadgen.workload.options import parse_options
from loadgen.workload.plan import Conversation, Workload

IDS = ContentSource(first_token_id=10, last_token_id=30_000)


def made(dataset: str, seed: int | str = 7, scale: float = 1.0, **options: str) -> Workload:
    origin = replace(Origin(seed=seed, source=IDS), scale_isl=scale, scale_osl=scale)
    return DATASETS[dataset].build(complete(dataset, parse_options(options)), origin)


def plans(workload: Workload, n: int) -> list[Conversation]:
    return [workload.conversation(index) for index in range(n)]
