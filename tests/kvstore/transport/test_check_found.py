"""An answer to Find is of one piece, whatever number of blocks it claims."""

import pytest

from common.errors import ProtocolViolation
from common.messages.blocks import Found
from kvstore.transport.check_found import check_found

ROW = (1, 2)


@pytest.mark.parametrize("n_blocks", [-1, 1, 3, 2**31, 2**63 - 1])
@pytest.mark.parametrize(("pages", "payloads"), [((ROW, ROW), []), ((), [b"KVKV", b"KVKV"]), ((), [])])
def test_a_number_of_blocks_that_is_not_there_is_refused_and_costs_nothing(
    n_blocks: int, pages: tuple[tuple[int, ...], ...], payloads: list[bytes]
) -> None:
    with pytest.raises(ProtocolViolation):
        check_found(Found(call=1, n_blocks=n_blocks, pages=pages), payloads, 2, 4)


def test_rows_of_pages_and_payloads_of_the_right_length_pass() -> None:
    check_found(Found(call=1, n_blocks=2, pages=(ROW, ROW)), [], 2, 4)
    check_found(Found(call=1, n_blocks=1), [b"KVKV"], 2, 4)
    check_found(Found(call=1, n_blocks=0), [], 2, 4)
