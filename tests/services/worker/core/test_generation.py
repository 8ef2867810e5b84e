"""When a prompt began, told by the steps that computed it."""

from types import SimpleNamespace

from common.ids import PeerId, RequestId
from common.messages.actions import Send
from common.messages.requests import Failed, Sampling, Timings
from services.worker.core.generation import Generation
from services.worker.core.plan import Segment, StepPlan
from services.worker.core.sequence import NewPrompt


def silent(*_: object) -> None:
    """Who does not matter here."""


def segment(name: str, count: int, *, sample: bool) -> Segment:
    return Segment(
        request=RequestId(name),
        tokens=[],
        prompt_tokens=200,
        start=0,
        count=count,
        table=None,  # type: ignore[arg-type]  # nobody looks into it
        sampling=Sampling(max_tokens=2),
        sample=sample,
    )


def test_a_prompts_piece_of_one_row_hides_no_beginning() -> None:
    others = SimpleNamespace(submit=silent, drop=silent, arrived=silent, forget=silent)
    generation = Generation(others, others)  # type: ignore[arg-type]
    for name in "ABC":
        prompt = NewPrompt(
            request=RequestId(name),
            tokens=(1,),
            sampling=Sampling(max_tokens=2),
            root=b"",
            hashes=(),  # type: ignore[arg-type]
        )
        generation.start(prompt, PeerId("gateway@1"), 0.0, 1e9)
    pieces = (segment("A", 100, sample=False), segment("B", 1, sample=True), segment("C", 9, sample=False))
    generation.note_began(StepPlan(1, pieces), 50.0)
    for name in "ABC":
        (told,) = generation.fail(RequestId(name), "stuck", "", now_ms=80.0)
        assert isinstance(told, Send) and isinstance(told.message, Failed)
        assert told.message.timings == Timings(prefill_queue_ms=50.0, compute_ms=30.0), name
