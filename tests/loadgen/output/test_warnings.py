from dataclasses import replace

from loadgen.output.warnings import warnings
from loadgen.results.timeline import LeakCheck, ServerView
from tests.loadgen.synthetic import Shape, run

RUN = run(Shape(n_requests=12))


def told(view: ServerView) -> str:
    return "\n".join(warnings(replace(RUN, server=view)))


def test_a_leak_check_that_failed_is_told_with_its_reason() -> None:
    assert "everything back is not known: status is gone" in told(
        ServerView(source="x", leak_check_failed="status is gone")
    )
    assert "is not known" not in told(ServerView(source="x"))


def test_a_leak_may_be_of_others() -> None:
    view = ServerView(source="x", leak_check=LeakCheck(held={"pages": (0.0, 3.0)}, waited_s=1.0))
    assert "or for other clients: pages 0 before, 3 after" in told(view)
