"""Groups of documents: all of them, in order, within both limits."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from neox.corpus.batching import batches


@given(st.lists(st.text("x", max_size=9)), st.integers(1, 20), st.integers(1, 5))
def test_no_group_is_beyond_a_limit(texts: list[str], characters: int, documents: int) -> None:
    found = list(batches(texts, len, characters, documents))
    assert [text for batch in found for text in batch] == texts
    for batch in found:
        assert len(batch) == 1 or (sum(map(len, batch)) <= characters and len(batch) <= documents)
    for batch, after in pairwise(found):  # the next one did not fit
        assert len(batch) == documents or sum(map(len, batch)) + len(after[0]) > characters
