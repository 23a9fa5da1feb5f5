"""The orders of samples at the size of the Pile: time to open, memory, tokens served a second, time to build.

    python benchmarks/sample_order.py [tokens=300e9] [documents=150e6] [served=200e6] [built=1e5,1e6,1e7] [turns=3]
                                      [folder=where temporary files go]

`permuted`: an index of `documents` documents with `tokens` tokens in all is written for real, 12 bytes a document; the
.bin beside it is as long as it would be but sparse, for nothing of it is read while opening. What is served comes from
a real file of `served` bytes of tokens, random ones, in the page cache. Each figure is of a fresh process on one core;
memory is what that process held at its peak (VmHWM), and what it had more than after its imports.

`megatron`: the whole of gpt-neox's arrays (doc_idx, sample_idx, shuffle_idx), for documents of 500 tokens on average
and one epoch of samples of 2048, by three programs in turn: ours, vectorised; the described loop in Python; and the
loop in C++, written here from the description, with numpy's shuffles as there. All three must be equal; the best of
`turns` is shown, of Python's loop the only one. Beside them what a run of ours does: no sample_idx, the same arrays
written, and when it starts again, maps of these.
"""

import ctypes
import json
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

LENGTH, SEED = 2048, 1234
LOOP = """
#include <cstdint>
extern "C" void sample_idx(const int32_t* sizes, const int32_t* doc_idx, int64_t samples, int32_t length,
                           int32_t* out) {
  int64_t place = 0;
  int32_t offset = 0;
  out[0] = 0;
  out[1] = 0;
  for (int64_t sample = 1; sample <= samples; ++sample) {
    int32_t left = length + 1;
    while (left > 0) {
      int32_t here = sizes[doc_idx[place]] - offset;
      left -= here;
      if (left <= 0) {
        offset += left + here - 1;  // the next sample begins on this one's last token
      } else {
        ++place;
        offset = 0;
      }
    }
    out[2 * sample] = static_cast<int32_t>(place);
    out[2 * sample + 1] = offset;
  }
}
"""


def memory(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def write_index(prefix, sizes):
    """A pair with these documents, its .bin sparse; the index block by block."""
    with open(f"{prefix}.idx", "wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, len(sizes), 0))
        sizes.astype("<i4").tofile(file)
        start = 0
        for first in range(0, len(sizes), 1 << 22):
            ends = start + np.cumsum(sizes[first : first + (1 << 22)], dtype=np.int64)
            (2 * np.concatenate([[start], ends[:-1]])).astype("<i8").tofile(file)
            start = int(ends[-1])
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * start)
    return start


def opened(prefix):
    """In a fresh process: open the permuted order, and ask it for windows."""
    from neox.data import TokenDataset

    before = memory("VmRSS")
    started = time.perf_counter()
    dataset = TokenDataset([prefix], LENGTH, SEED)
    seconds = time.perf_counter() - started
    peak = memory("VmHWM")
    samples = np.arange(1 << 16)
    started = time.perf_counter()
    dataset.order(samples)
    rate = len(samples) * LENGTH / (time.perf_counter() - started)
    return {
        "tokens": len(dataset.sources[0].tokens),
        "documents": len(dataset.sources[0]),
        "open": seconds,
        "peak": peak,
        "more": peak - before,
        "order": rate,
    }


def served(prefix):
    """In a fresh process: tokens a second of a real file, in batches of 64 samples, an epoch over."""
    from neox.data import TokenDataset

    dataset = TokenDataset([prefix], LENGTH, SEED)
    dataset.sequential(np.arange(dataset.num_windows))  # into the page cache, and the process's map
    rates = []
    for _ in range(5):
        started = time.perf_counter()
        for first in range(0, dataset.num_windows, 64):
            dataset.sample(np.arange(first, first + 64))
        count = -(-dataset.num_windows // 64) * 64
        rates.append(count * LENGTH / (time.perf_counter() - started))
    return {"bytes": 2 * len(dataset.sources[0].tokens), "rate": float(np.median(rates))}


def python_loop(sizes, doc_idx, samples):
    """sample_idx from its description."""
    sizes, doc_idx = sizes.tolist(), doc_idx.tolist()
    out = [(0, 0)]
    place = offset = 0
    for _ in range(samples):
        left = LENGTH + 1
        while left > 0:
            here = sizes[doc_idx[place]] - offset
            left -= here
            if left <= 0:
                offset += left + here - 1
            else:
                place, offset = place + 1, 0
        out.append((place, offset))
    return np.array(out, np.int32)


def shuffles(documents, samples):
    rng = np.random.RandomState(SEED)
    doc_idx = np.arange(documents, dtype=np.int32)
    rng.shuffle(doc_idx)
    shuffle_idx = np.arange(samples, dtype=np.uint32)
    rng.shuffle(shuffle_idx)
    return doc_idx, shuffle_idx


def compiled(folder):
    """The loop in C++, None where there is no compiler."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        return None
    (folder / "loop.cpp").write_text(LOOP)
    library = folder / "loop.so"
    subprocess.run([compiler, "-O3", "-shared", "-fPIC", "-o", library, folder / "loop.cpp"], check=True)
    function = ctypes.CDLL(str(library)).sample_idx
    pointer = np.ctypeslib.ndpointer(np.int32, flags="C")
    function.argtypes = [pointer, pointer, ctypes.c_int64, ctypes.c_int32, pointer]
    function.restype = None

    def run(sizes, doc_idx, samples):
        out = np.empty((samples + 1, 2), np.int32)
        function(sizes, doc_idx, samples, LENGTH, out)
        return out

    return run


def built(folder, documents, loop, turns):
    """Seconds of each program, the best of some turns; they must agree."""
    from neox.data import TokenFile
    from neox.data import megatron as module
    from neox.data.split import Documents

    sizes = np.random.default_rng(documents).integers(1, 1000, documents).astype(np.int32)
    tokens = write_index(folder / "built", sizes)
    part, samples = Documents(TokenFile(folder / "built")), (tokens - 1) // LENGTH
    cache, module.SMALL = folder / "order", 0
    seconds = {}

    def timed(key, call):
        started = time.perf_counter()
        result = call()
        took = time.perf_counter() - started
        seconds[key] = min(took, seconds.get(key, took))
        return result

    def ours(kept=None):
        return module.MegatronDataset(part, LENGTH, SEED, samples, cache=kept)

    def all_of_ours():
        order = ours()
        return order.doc_idx, np.concatenate([*order.whole_sample_idx()]), order.shuffle_idx

    def theirs(build):
        doc_idx, shuffle_idx = shuffles(documents, samples)
        return doc_idx, build(sizes, doc_idx, samples), shuffle_idx

    for turn in range(turns):
        found = timed("ours", all_of_ours)
        others = [timed("c++", lambda: theirs(loop))] if loop else []
        if not turn:
            others.append(timed("python", lambda: theirs(python_loop)))
        timed("a run", ours)
        shutil.rmtree(cache, ignore_errors=True)
        timed("first", lambda: ours(cache))
        timed("again", lambda: ours(cache))
        for other in others:
            for mine, array in zip(found, other, strict=True):
                assert (mine == array).all(), "the arrays differ"
    return seconds


def main(given):
    options = {
        "tokens": "300e9",
        "documents": "150e6",
        "served": "200e6",
        "built": "1e5,1e6,1e7",
        "turns": "3",
        "folder": "",
    }
    options |= dict(argument.split("=", 1) for argument in given)
    total, documents, real = (int(float(options[key])) for key in ("tokens", "documents", "served"))

    def fresh(what, prefix):
        command = [sys.executable, __file__, f"only={what}", f"prefix={prefix}"]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)

    with tempfile.TemporaryDirectory(dir=options["folder"] or None) as name:
        folder = Path(name)
        mean = total // documents
        sizes = np.random.default_rng(0).integers(1, 2 * mean, documents, dtype=np.int32)
        write_index(folder / "large", sizes)
        del sizes
        found = fresh("opened", folder / "large")
        (folder / "large.idx").unlink()
        print(
            f"permuted, {found['tokens']:,} tokens in {found['documents']:,} documents: "
            f"opened in {found['open']:.3f} s, peak memory {found['peak'] / 1e6:.0f} MB "
            f"({found['more'] / 1e6:.0f} MB more than the imports), order of {found['order'] / 1e6:,.0f} M tokens/s",
            flush=True,
        )
        rng = np.random.default_rng(1)
        write_index(folder / "real", np.full(real // 2000, 1000, np.int32))
        with open(folder / "real.bin", "wb") as file:
            for _ in range(real // 2000 // 1000):
                rng.integers(0, 50277, 1_000_000, dtype=np.uint16).tofile(file)
            rng.integers(0, 50277, real // 2000 % 1000 * 1000, dtype=np.uint16).tofile(file)
        found = fresh("served", folder / "real")
        print(f"permuted, {found['bytes'] / 1e6:.0f} MB of tokens: {found['rate'] / 1e6:,.0f} M tokens/s on one core")
        loop = compiled(folder)
        columns = {
            "ours": "ours, all arrays",
            "c++": "C++ loop",
            "python": "Python loop",
            "a run": "ours, a run's",
            "first": "and written",
            "again": "mapped again",
        }
        print("\nmegatron, seconds (ns a document)")
        print(f"{'documents':>12}" + "".join(f"{title:>20}" for title in columns.values()))
        for count in (int(float(text)) for text in options["built"].split(",")):
            seconds = built(folder, count, loop, int(options["turns"]))
            cells = [
                f"{seconds[key]:.3f} ({seconds[key] / count * 1e9:,.0f})" if key in seconds else "-" for key in columns
            ]
            print(f"{count:>12,}" + "".join(f"{cell:>20}" for cell in cells), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("only="):
        prefix = sys.argv[2].partition("=")[2]
        print(json.dumps({"opened": opened, "served": served}[sys.argv[1].partition("=")[2]](prefix)))
    else:
        main(sys.argv[1:])
