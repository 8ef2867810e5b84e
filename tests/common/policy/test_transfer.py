"""Granularity of transfers: a fixed setting holds at any load, `auto` follows the load."""

import pytest

from common.policy.transfer import AUTO, Granularity, choose


@pytest.mark.parametrize("setting", list(Granularity))
def test_a_fixed_setting_holds_at_any_load(setting: Granularity) -> None:
    assert {choose(setting.value, n, n) for n in (0, 1, 4, 16, 1000)} == {setting}


def test_auto_goes_aggregated_when_much_is_open_and_most_of_it_waits_for_grants() -> None:
    assert choose(AUTO, 0, 0) is choose(AUTO, 2, 2) is choose(AUTO, 16, 0) is choose(AUTO, 16, 4) is Granularity.LAYER
    assert choose(AUTO, 4, 4) is choose(AUTO, 16, 16) is choose(AUTO, 16, 12) is Granularity.AGGREGATED


@pytest.mark.parametrize("open_transfers", range(20))
def test_auto_changes_once_as_more_grants_are_late(open_transfers: int) -> None:
    chosen = [choose(AUTO, open_transfers, waiting) for waiting in range(open_transfers + 1)]
    assert chosen == sorted(chosen, key=lambda mode: mode is Granularity.AGGREGATED)


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ValueError, match="blockwise"):
        choose("blockwise", 0, 0)
