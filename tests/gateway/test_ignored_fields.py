"""Fields that nobody knows: ignored, and told in a header of every answer."""

import re
from typing import Any

import httpx
import pytest

from gateway.ignored_fields import HEADER, PATTERN, IgnoredFields, ignored_fields
from gateway.openai_schema import read_completion
from tests.gateway.cluster import Cluster
from tests.gateway.model import ids
from tests.gateway.test_errors import chat, completion


def counted(client: httpx.Client) -> float:
    found = re.search(r"^penstock_gateway_ignored_fields_total (\S+)$", client.get("/metrics").text, re.MULTILINE)
    assert found is not None
    return float(found[1])


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("completions", completion(max_token=5, foo={"bar": 1}), 200),
        ("completions", completion(max_token=5, foo={"bar": 1}, stream=True), 200),
        ("chat/completions", chat(foo=None, max_token=5), 200),
        ("completions", completion(max_token=5, foo=1, max_tokens="x"), 400),
        ("completions", {"max_token": 5, "foo": 1}, 400),
        ("completions", completion(max_token=5, foo=1, logit_bias={"1": 2}), 400),
        ("completions", completion(max_token=5, foo=1, model="another"), 404),
    ],
    ids=["whole", "stream", "chat", "bad field", "missing field", "unsupported field", "unknown model"],
)
def test_every_answer_names_the_fields_that_nobody_knows(
    up: Cluster, path: str, body: dict[str, Any], status: int
) -> None:
    up.answer(ids("x"))
    with up.http() as client:
        before = counted(client)
        response = client.post(f"/v1/{path}", json=body)
        assert (response.status_code, response.headers.get(HEADER)) == (status, "foo,max_token")
        assert counted(client) == before + 2


def test_an_answer_to_known_fields_names_none(up: Cluster) -> None:
    up.answer(ids("x"))
    with up.http() as client:
        before = counted(client)
        for body in (completion(user="me"), completion(max_tokens=-1), completion(stream=True)):
            assert HEADER not in client.post("/v1/completions", json=body).headers
        assert HEADER not in client.post("/v1/completions", content=b'{"max_token": 5').headers
        assert counted(client) == before


@pytest.mark.parametrize("colons", [4096, 4097])
def test_of_a_body_with_very_many_fields_the_first_one_is_told(colons: int) -> None:
    told: list[IgnoredFields] = []
    unknown = ",".join(f'"n{number}": 0' for number in range(colons - 2))
    read_completion(f'{{{unknown}, "model": "m", "prompt": "x"}}'.encode(), told.append)
    assert [one.header.partition(";")[::2] for one in told] == [
        ("n0", "more")
        if colons > 4096
        else ("n0,n1,n10,n100,n1000,n1001,n1002,n1003,n1004,n1005,n1006,n1007,n1008,n1009,n101,n1010", "more=4078")
    ]
    assert re.fullmatch(PATTERN, told[0].header)


def test_a_name_that_is_no_text_hides_none_of_the_others() -> None:
    told: list[IgnoredFields] = []
    read_completion(b'{"model": "m", "foo": 2, "prompt": "x", "\xff": 1}', told.append)
    assert [one.header for one in told] == ["foo;more"]


@pytest.mark.parametrize(
    ("names", "header"),
    [
        ([], ""),
        (["b", "a", "c.d-e"], "a,b,c.d-e"),
        (["é", "x\r\nset-cookie: a=b", "", "a,b", "a;more=9", "x" * 65, "\x00", "ok\n", "ok"], "ok;more=8"),
        (["a b"], ";more=1"),
        ([f"n{number:02d}" for number in range(40)], ",".join(f"n{number:02d}" for number in range(16)) + ";more=24"),
    ],
)
def test_a_client_cannot_say_anything_else_through_the_header(names: list[str], header: str) -> None:
    told = ignored_fields(names)
    assert (told.total, told.header) == (len(names), header)
    assert re.fullmatch(PATTERN, told.header)
