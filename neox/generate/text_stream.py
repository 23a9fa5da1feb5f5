"""Streaming text of a sequence: whole characters, and nothing that a stop string could still cut off."""

from collections.abc import Sequence

from neox.tokenizer import StreamDecoder, Tokenizer


class TextStream:
    """Decode tokens as they arrive; the joined pieces are the text up to the first stop string.

    The end of the text that could still become a stop string is held back. `stopped` is true once one was found; of
    several found at once, the one that begins first counts. `before` is put in front, and is not searched. Raises
    ValueError where the tokenizer is not byte-level.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), before: str = "") -> None:
        self._decoder, self._before = StreamDecoder(tokenizer), before
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; returns the new text."""
        before, self._before = self._before, ""
        return before + self._release(self._decoder.push(token))

    def finish(self) -> str:
        """Return the text held back, after the last token."""
        text = self._before + self._release(self._decoder.finish())
        text, self._before, self._held = text + self._held, "", ""
        return text

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        if not self._stop:
            return new
        text = self._held + new
        starts = [start for stop in self._stop if (start := text.find(stop)) >= 0]
        if starts:
            self.stopped, self._held = True, ""
            return text[: min(starts)]
        keep = next((n for n in range(len(text)) if self._may_begin(text[n:])), len(text))
        self._held = text[keep:]
        return text[:keep]

    def _may_begin(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stop)
