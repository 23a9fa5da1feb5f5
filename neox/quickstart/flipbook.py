"""Flipbook: an HTML page that continues the same prompts at steps 0, 1, 2, 4 .. last of a run.

The page is whole: no network, no other file, it opens from file:// and says so to the browser (a content security
policy that admits nothing from outside). The template is `flipbook.html`, with one placeholder for the data as JSON.
"""

import codecs
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from neox.system.files import write_atomic
from neox.system.pictures import template_page

BITS_DECIMALS = 2
_KEYS = ("step", "tokens_seen", "loss", "bpb", "samples", "surprise")


def write_flipbook(
    path: str | os.PathLike[str],
    pages: Sequence[Mapping[str, Any]],
    heldout: Mapping[str, str],
    meta: Mapping[str, Any],
) -> Path:
    """Write the page and return its path. The file is the old one or the new one, never a half.

    pages: in order of step, each
        step          training steps taken (0: as initialised)
        tokens_seen   tokens trained on
        loss          held-out nats per token, or None
        bpb           held-out bits per byte, or None
        samples       [{"prompt": str, "text": str}]: text is the continuation; the same prompts on every page
        surprise      [[token_text, bits]] of the held-out excerpt; the same token texts on every page, bits is
                      -log2 of the probability, None (or not finite) where the model made no prediction
                      (`merge_pieces` makes it from tokens that may split a character)
    heldout: {"title": where the excerpt is from, "text": the excerpt, which is the token texts end to end}
    meta: {"title": heading, "facts": {label: value}, "baselines": {name: bits per byte}}, each of them optional

    Raises ValueError where these do not fit together, OSError where `path` cannot be written.
    """
    page = template_page("neox.quickstart", "flipbook.html", flipbook_data(pages, heldout, meta))
    write_atomic(Path(path), page.encode())
    return Path(path)


def flipbook_data(
    pages: Sequence[Mapping[str, Any]], heldout: Mapping[str, str], meta: Mapping[str, Any]
) -> dict[str, Any]:
    """Data of the page's script: the arguments, with token texts once and bits to two decimals.

    Raises ValueError as `write_flipbook` does.
    """
    if not pages:
        raise ValueError("a flipbook needs at least one page")
    for number, page in enumerate(pages):
        absent = [key for key in _KEYS if key not in page]
        if absent:
            raise ValueError(f"flipbook page {number} has no {', '.join(map(repr, absent))}")
    tokens = [token for token, _ in pages[0]["surprise"]]
    prompts = [sample["prompt"] for sample in pages[0]["samples"]]
    if "".join(tokens) != heldout["text"]:
        raise ValueError("flipbook: the token texts of page 0, end to end, are not the held-out text")
    previous = -1
    for number, page in enumerate(pages):
        where = f"flipbook page {number} (step {page['step']})"
        if page["step"] <= previous:
            raise ValueError(f"{where} does not come after step {previous}: pages go in order of step")
        previous = page["step"]
        if [token for token, _ in page["surprise"]] != tokens:
            raise ValueError(f"{where}: its tokens are not those of page 0")
        if [sample["prompt"] for sample in page["samples"]] != prompts:
            raise ValueError(f"{where}: its prompts are not those of page 0")
    return {
        "title": meta.get("title", "A model learns"),
        "facts": [[str(label), str(value)] for label, value in meta.get("facts", {}).items()],
        "baselines": {name: float(value) for name, value in meta.get("baselines", {}).items()},
        "heldout": {"title": heldout.get("title", "held-out text"), "tokens": tokens},
        "prompts": prompts,
        "pages": [
            {
                "step": page["step"],
                "tokens_seen": page["tokens_seen"],
                "loss": _finite(page["loss"]),
                "bpb": _finite(page["bpb"]),
                "texts": [sample["text"] for sample in page["samples"]],
                "bits": [_finite(bits, BITS_DECIMALS) for _, bits in page["surprise"]],
            }
            for page in pages
        ],
    }


def merge_pieces(pieces: Iterable[bytes], bits: Iterable[float | None]) -> list[list[Any]]:
    """[[text, bits]] from the bytes and bits of each token: tokens that share a character become one entry.

    Byte-level tokens may end within a character. Their bits add up (None, no prediction, wins), and texts end to end
    are the UTF-8 decoding of the pieces end to end; bytes that are not UTF-8 become U+FFFD. A token without bytes
    goes with the next entry.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    merged: list[list[Any]] = []
    text, total = "", 0.0
    known = True
    for piece, piece_bits in zip(pieces, bits, strict=True):
        text += decoder.decode(piece)
        known = known and piece_bits is not None
        total += piece_bits or 0.0
        if text and not decoder.getstate()[0]:  # no byte waits for the rest of its character
            merged.append([text, total if known else None])
            text, total, known = "", 0.0, True
    if tail := text + decoder.decode(b"", final=True):
        merged.append([tail, total if known else None])
    return merged


def _finite(value: float | None, decimals: int | None = None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return value if decimals is None else round(value, decimals)
