"""What the loop makes of several events at once."""

from common.ids import PeerId
from services.worker.inbox import LayerDone, PeerGone, joined


def test_layers_that_follow_one_another_are_told_at_once() -> None:
    assert joined([LayerDone(0), LayerDone(1), LayerDone(2)]) == [LayerDone(0, 3)]


def test_nothing_is_told_before_what_happened_before_it() -> None:
    gone = PeerGone(PeerId("a@1"))
    assert joined([LayerDone(0), gone, LayerDone(1)]) == [LayerDone(0), gone, LayerDone(1)]


def test_a_gap_or_a_new_step_begins_anew() -> None:
    assert joined([LayerDone(1), LayerDone(0), LayerDone(2)]) == [LayerDone(1), LayerDone(0), LayerDone(2)]
