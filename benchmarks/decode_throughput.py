"""Decode and prefill throughput of the engine over `transformers.generate`, same checkpoint, same batch, same run.

    python -m benchmarks.decode_throughput --model DIR [--streams 16] [--rounds 3] [--json FILE]

Both sides take turns, several rounds; medians are compared. Prefill ends and decode begins with the first token.
Without --model a `small` checkpoint is made in a temporary folder.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from common.ids import RequestId
from common.messages.requests import Sampling
from kvstore.index.page_table import PageTable
from services.worker.core.plan import Segment, StepPlan
from services.worker.engine.engine import TorchEngine
from services.worker.engine.torch_options import configure_torch
from services.worker.model.load import LoadedModel, load_model
from services.worker.model.make import make_model

TARGET_RATIO = 2.5


@dataclass(frozen=True)
class Speeds:
    """Tokens per second of one side in one round."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float


@dataclass(frozen=True)
class Comparison:
    """Medians over the rounds of one number of streams."""

    streams: int
    prompt_tokens: int
    decode_tokens_per_s: float
    reference_decode_tokens_per_s: float
    decode_ratio: float
    prefill_tokens_per_s: float
    reference_prefill_tokens_per_s: float
    prefill_ratio: float


class EngineSide:
    """The engine with a pool just large enough, prompts prefilled in chunks of 512 rows."""

    def __init__(self, model: LoadedModel, streams: int, context_tokens: int) -> None:
        layout = model.layout
        n_pages = streams * layout.pages_for(context_tokens)
        pages = torch.zeros(n_pages, layout.block_tokens, 2, layout.kv_heads, layout.head_dim, dtype=model.dtype)
        self.engine = TorchEngine(model, pages, layout)
        self.tables = []
        for stream in range(streams):
            table = PageTable(layout.layers)
            first = stream * layout.pages_for(context_tokens)
            own = np.arange(first, first + layout.pages_for(context_tokens), dtype=np.int32)
            table.append(own.reshape(-1, layout.layers))
            self.tables.append(table)

    def measure(self, prompts: list[list[int]], output_tokens: int) -> Speeds:
        sequences = [list(prompt) for prompt in prompts]
        started_s = time.perf_counter()
        for stream, tokens in enumerate(sequences):
            for start in range(0, len(tokens), 512):
                count = min(512, len(tokens) - start)
                self._step([self._segment(stream, tokens, start, count, len(prompts[0]))], sequences)
        prefilled_s = time.perf_counter()
        for _ in range(output_tokens - 1):
            segments = [
                self._segment(stream, tokens, len(tokens) - 1, 1, len(prompts[0]))
                for stream, tokens in enumerate(sequences)
            ]
            self._step(segments, sequences)
        done_s = time.perf_counter()
        n_prompt = sum(len(prompt) for prompt in prompts)
        decoded = len(prompts) * (output_tokens - 1)
        return Speeds(n_prompt / (prefilled_s - started_s), decoded / (done_s - prefilled_s))

    def _step(self, segments: list[Segment], sequences: list[list[int]]) -> None:
        for sampled in self.engine.step(StepPlan(0, tuple(segments))).sampled:
            sequences[int(sampled.request)].append(sampled.token)

    def _segment(self, stream: int, tokens: list[int], start: int, count: int, prompt_tokens: int) -> Segment:
        return Segment(
            request=RequestId(str(stream)),
            tokens=tokens,
            prompt_tokens=prompt_tokens,
            start=start,
            count=count,
            table=self.tables[stream],
            sampling=Sampling(max_tokens=1),
            sample=start + count == len(tokens),
        )


class TokenTimes(StoppingCriteria):  # type: ignore[misc]  # mypy does not follow transformers
    """Never stops; notes when each token of the batch was done. `generate` calls it once per token."""

    def __init__(self) -> None:
        self.at_s: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        self.at_s.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def measure_reference(model: PreTrainedModel, prompts: list[list[int]], output_tokens: int) -> Speeds:
    ids = torch.tensor(prompts)
    mask = torch.ones_like(ids)

    clock = TokenTimes()
    started_s = time.perf_counter()
    model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=output_tokens,
        min_new_tokens=output_tokens,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    first_s, last_s = clock.at_s[0], clock.at_s[-1]
    decoded = len(prompts) * (len(clock.at_s) - 1)
    return Speeds(ids.numel() / (first_s - started_s), decoded / (last_s - first_s))


def compare(
    engine_model: LoadedModel, reference: PreTrainedModel, streams: int, options: argparse.Namespace
) -> Comparison:
    generator = torch.Generator().manual_seed(streams)
    prompts = torch.randint(
        5, engine_model.identity.vocab_tokens, (streams, options.prompt_tokens), generator=generator
    ).tolist()
    side = EngineSide(engine_model, streams, options.prompt_tokens + options.output_tokens)
    side.measure(prompts, 4)  # first calls compile kernels and fault memory in
    measure_reference(reference, prompts, 2)
    ours: list[Speeds] = []
    theirs: list[Speeds] = []
    for round_ in range(options.rounds):
        ours.append(side.measure(prompts, options.output_tokens))
        theirs.append(measure_reference(reference, prompts, options.reference_output_tokens))
        sys.stderr.write(f"{streams} streams, round {round_ + 1}: {ours[-1]} over {theirs[-1]}\n")
    gc.collect()
    decode, prefill = (
        [statistics.median(getattr(one, name) for one in speeds) for speeds in (ours, theirs)]
        for name in ("decode_tokens_per_s", "prefill_tokens_per_s")
    )
    return Comparison(
        streams=streams,
        prompt_tokens=options.prompt_tokens,
        decode_tokens_per_s=decode[0],
        reference_decode_tokens_per_s=decode[1],
        decode_ratio=decode[0] / decode[1],
        prefill_tokens_per_s=prefill[0],
        reference_prefill_tokens_per_s=prefill[1],
        prefill_ratio=prefill[0] / prefill[1],
    )


def print_table(results: Sequence[Comparison]) -> None:
    print(
        f"{'streams':>8}{'decode tok/s':>15}{'generate':>11}{'ratio':>8}{'prefill tok/s':>16}{'generate':>11}{'ratio':>8}"
    )
    for one in results:
        print(
            f"{one.streams:>8}{one.decode_tokens_per_s:>15.1f}{one.reference_decode_tokens_per_s:>11.1f}"
            f"{one.decode_ratio:>8.2f}{one.prefill_tokens_per_s:>16.1f}{one.reference_prefill_tokens_per_s:>11.1f}"
            f"{one.prefill_ratio:>8.2f}"
        )


def main(argv: Sequence[str]) -> int:
    """Exit code 1 if the ratio at the largest number of streams misses its target."""
    parser = argparse.ArgumentParser(prog="decode_throughput", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default=None, help="folder of the checkpoint; default: a new `small` one")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=33, help="of the engine per stream and round")
    parser.add_argument("--reference-output-tokens", type=int, default=9, help="of generate per stream and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None, help="also write the results to this file")
    options = parser.parse_args(argv)
    threads = configure_torch(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or make_model("small", Path(scratch) / "small")
        model = load_model(folder, options.dtype)
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).eval()
    results = [compare(model, reference, streams, options) for streams in options.streams]
    print(f"{threads} threads, {options.dtype} checkpoint, computed in {model.compute_dtype}")
    print_table(results)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(one) for one in results], indent=1) + "\n")
    return 0 if results[-1].decode_ratio >= TARGET_RATIO else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
