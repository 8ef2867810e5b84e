import pytest

from loadgen.workload.content import ContentSource, count_by_characters, count_words, join, trim


@pytest.mark.parametrize("kind", ["ids", "words"])
def test_equal_names_give_equal_content_and_others_do_not(kind: str) -> None:
    source = ContentSource(kind=kind)
    assert source.draw("a", 20) == source.draw("a", 20) == source.shared("a", 20)
    assert source.draw("a", 20) != source.draw("b", 20)


@pytest.mark.parametrize("kind", ["ids", "words"])
def test_a_longer_piece_begins_with_the_shorter_one_of_its_name(kind: str) -> None:
    source = ContentSource(kind=kind)
    short = source.draw("a", 7)
    assert source.draw("a", 30)[: len(short)] == short
    assert count_words(short) == 7


def test_ids_come_from_their_range_only() -> None:
    assert set(ContentSource(first_token_id=5, last_token_id=7).draw("a", 200)) == {5, 6, 7}


def test_contents_of_two_kinds_are_not_joined() -> None:
    assert join("a b", "c") == "a b c"
    assert join((), "c") == "c"
    assert join((1,), (2,)) == (1, 2)
    with pytest.raises(TypeError, match="text"):
        join((1,), "c")


@pytest.mark.parametrize("count", [count_words, count_by_characters])
def test_trimmed_text_is_a_beginning_that_counts_no_more(count: object) -> None:
    text = " ".join(f"word{i}" for i in range(100))
    assert callable(count)
    for most in (0, 1, 3, 17, 1000):
        trimmed = trim(text, most, count)
        assert isinstance(trimmed, str)
        assert text.startswith(trimmed)
        assert count(trimmed) <= most
        assert count(trimmed) >= min(most, count(text)) * 0.5
