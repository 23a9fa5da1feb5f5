"""Compression baselines on the held-out text: figures that a language model has to beat.

A compressor that turns N bytes into n predicts them at 8 n / N bits per byte, the unit in which a model's loss is
counted too. Three of them, none of which knows anything but bytes:

- gzip: `gzip -9` of the held-out text alone;
- xz: `xz -9e` of the held-out text alone;
- xz_primed: what the held-out text adds to an xz file when it follows the training text, the fair rival of a model
  that was trained on it. Its dictionary spans both, so no training text is out of reach.
"""

import gzip
import lzma
import threading
from concurrent.futures import Future

_MIN_DICTIONARY = 1 << 20  # bytes; below it, a larger one changes neither size nor speed
_MAX_DICTIONARY = (1 << 30) + (1 << 29)  # bytes; what liblzma admits


def compressor_baselines(train_bytes: bytes, heldout_bytes: bytes) -> dict[str, float]:
    """Bits per byte of the held-out text: {"gzip": .., "xz": .., "xz_primed": ..}.

    xz_primed compresses all of the training text twice (21 s for 13 MB on one core; the interpreter's lock is
    released), see `start_baselines`. It needs about 12 bytes of memory per byte of text.

    Raises ValueError where the held-out text is empty.
    """
    if not heldout_bytes:
        raise ValueError("no held-out text to compress: the corpus has none")
    size = 8 / len(heldout_bytes)
    both = train_bytes + heldout_bytes
    return {
        "gzip": size * len(gzip.compress(heldout_bytes, compresslevel=9, mtime=0)),
        "xz": size * _xz_size(heldout_bytes, span=len(heldout_bytes)),
        "xz_primed": size * (_xz_size(both, span=len(both)) - _xz_size(train_bytes, span=len(both))),
    }


def start_baselines(train_bytes: bytes, heldout_bytes: bytes) -> Future[dict[str, float]]:
    """`compressor_baselines` in a background thread, to be waited for with `.result()`; never holds up an exit."""
    future: Future[dict[str, float]] = Future()

    def work() -> None:
        try:
            future.set_result(compressor_baselines(train_bytes, heldout_bytes))
        except BaseException as error:
            future.set_exception(error)

    # A daemon thread and not an executor: an executor is joined at exit, and Ctrl-C would wait for the compressor.
    threading.Thread(target=work, name="compressor-baselines", daemon=True).start()
    return future


def _xz_size(data: bytes, span: int) -> int:
    """Bytes of an `xz -9e` file whose dictionary holds `span` bytes."""
    # Not the preset's fixed 64 MiB: a larger text would fall out of it, and a smaller one needs a tenth of the memory.
    dictionary = min(max(1 << (span - 1).bit_length(), _MIN_DICTIONARY), _MAX_DICTIONARY) if span else _MIN_DICTIONARY
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}]
    return len(lzma.compress(data, format=lzma.FORMAT_XZ, filters=filters))
