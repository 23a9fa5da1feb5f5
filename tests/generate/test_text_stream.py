"""Streamed text with stop strings against a search over all that has come so far, done again at each token."""

import codecs

from hypothesis import example, given, settings
from hypothesis import strategies as st

from neox.generate import TextStream


class Pieces:
    """Just enough of a tokenizer: token i stands for the i-th bytes."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces

    def token_bytes(self, id: int, skip_special: bool = False) -> bytes:
        return self.pieces[id]


def characters(raw: bytes, final: bool = False) -> str:
    """Whole characters only, the rest to come."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(raw, final)


# Few letters, so that stop strings occur, begin and break off; "é" and the emoji are split between tokens.
tokens = st.sampled_from(
    [b"a", b"b", b"ab", b"ba", b"aab", b"", "é".encode(), b"\xc3", b"\xa9", "🙂".encode()[:3], b"\x82"]
)
stop_strings = st.one_of(st.text("ab", min_size=1, max_size=3), st.text("abé🙂\ufffd", min_size=1, max_size=4))
stops = st.lists(stop_strings, max_size=3)


@settings(max_examples=200, deadline=None)
@given(pieces=st.lists(tokens, max_size=12), stop=stops)
@example(pieces=[b"aab"], stop=["b", "ab"])  # both are complete at once: the one that begins first counts
def test_streamed_text_ends_before_the_first_stop_string_and_holds_back_no_more_than_it_must(pieces, stop):
    stream = TextStream(Pieces(pieces), stop)
    shown = ""
    for number in range(len(pieces) + 1):
        last = number == len(pieces)
        so_far = characters(b"".join(pieces[: number + 1]), final=last)
        shown += stream.finish() if last else stream.push(number)
        found = [so_far.find(one) for one in stop if one in so_far]
        assert stream.stopped == bool(found)
        if found:
            assert shown == so_far[: min(found)]
            assert stream.push(0) == stream.finish() == ""
            return
        held = (
            0 if last else max((n for one in stop for n in range(1, len(one)) if so_far.endswith(one[:n])), default=0)
        )
        assert shown == so_far[: len(so_far) - held]
