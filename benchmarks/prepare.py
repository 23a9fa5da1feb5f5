"""Text to tokens on one core: neox beside a loop as gpt-neox's `preprocess_data` does it, on the same shards.

    python benchmarks/prepare.py [sizes=10,100,1000] [peer=10] [turns=3] [tokenizer=../shared/data/20B_tokenizer.json]

The text is what every machine has: sources and documents of Python's standard library and of the installed packages,
a file a document, repeated with a line of its own each time until there are `sizes` MB, in .jsonl.zst files of 50 MB.
Each measurement is a process of its own, on one core (`taskset` where there is one), from files to .bin and .idx:

    loop       zstandard, json.loads, tokenizers.encode, one document at a time, ids appended to the .bin
    neox       prepare(workers=1), with whatever `data.backend=auto` takes, which is named
    reference  prepare(workers=1, backend="tokenizers")

The loop and the reference run up to `peer` MB: their speed does not depend on the size. At that size all three must
write the same .bin. MB are those of the decompressed text; peak memory is VmHWM. Medians over the turns.
"""

import hashlib
import json
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

FILE_BYTES = 50_000_000
SUFFIXES = (".py", ".md", ".rst", ".txt")
WHO = ("loop", "reference", "neox")


def main(sizes, peer, turns, tokenizer):
    with tempfile.TemporaryDirectory(prefix="prepare-") as folder:
        folder = Path(folder)
        print(f"{'MB':>6} {'who':<22} {'seconds':>9} {'MB/s':>8} {'tokens/s':>11} {'peak MB':>8}")
        loop = 0.0  # at the largest size that it is run at
        for size in sizes:
            names = [who for who in WHO if who == "neox" or size <= peer]
            speeds = measure(folder / str(size), size, names, turns, tokenizer)
            loop = speeds.get("loop", loop)
            if loop:
                print(f"{size:6} neox against the loop: {speeds['neox'] / loop:.1f} times", flush=True)


def measure(folder, size, names, turns, tokenizer):
    """MB/s of each, printed too; their .bin must be the same."""
    text = write(folder / "in", size * 1_000_000)
    found = {who: [] for who in names}
    digests = set()
    for turn in range(turns):
        for who in names:
            out = folder / f"{who}-{turn}"
            command = [sys.executable, __file__, f"only={who}", str(folder / "in"), str(out), tokenizer]
            one_core = ["taskset", "-c", "0"] if Path("/usr/bin/taskset").exists() else []
            done = subprocess.run([*one_core, *command], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            found[who].append(json.loads(done.stdout.splitlines()[-1]))
            digests.add(hashlib.sha256(out.with_suffix(".bin").read_bytes()).hexdigest())
            for path in folder.glob(f"{out.name}.*"):
                path.unlink()
    if len(digests) != 1:
        raise SystemExit(f"{size} MB: the token files differ")
    speeds = {}
    for who, rows in found.items():
        seconds = statistics.median(row["seconds"] for row in rows)
        speeds[who] = text / 1e6 / seconds
        peak, tokens = max(row["peak"] for row in rows), rows[0]["tokens"]
        name = f"{who} ({rows[0]['backend']})"
        print(f"{size:6} {name:<22} {seconds:9.2f} {speeds[who]:8.2f} {tokens / seconds:11,.0f} {peak / 1e6:8.0f}")
    for path in (folder / "in").iterdir():
        path.unlink()
    return speeds


def write(folder, size):
    """Write documents of about `size` bytes in all; returns the bytes of their text."""
    import zstandard

    folder.mkdir(parents=True)
    written = 0
    texts = documents()
    number = 0
    while written < size:
        path = folder / f"{number:04}.jsonl.zst"
        number += 1
        end = min(size, written + FILE_BYTES)
        with path.open("wb") as file, zstandard.ZstdCompressor(level=3).stream_writer(file) as packed:
            while written < end:
                text = next(texts)
                packed.write(json.dumps({"text": text, "meta": {"pile_set_name": "Github"}}).encode() + b"\n")
                written += len(text.encode())
    return written


def documents():
    """The files of this machine's Python, over and over, each time with a line that was not there."""
    roots = sorted({sysconfig.get_path(name) for name in ("stdlib", "purelib")})
    paths = sorted({path for root in roots for path in Path(root).rglob("*") if path.suffix in SUFFIXES})
    turn = 0
    while True:
        for path in paths:
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if text:
                yield text if not turn else f"edition {turn} of {path.name}\n{text}"
        turn += 1


def loop(source, out, tokenizer):
    """As gpt-neox's tools/datasets/preprocess_data.py: each document is parsed, encoded and appended by itself."""
    import io

    import numpy as np
    import zstandard
    from tokenizers import Tokenizer

    inner = Tokenizer.from_file(tokenizer)
    eod, tokens = inner.token_to_id("<|endoftext|>"), 0
    with out.with_suffix(".bin").open("wb") as file:
        for path in sorted(source.iterdir()):
            with path.open("rb") as packed, zstandard.ZstdDecompressor().stream_reader(packed) as raw:
                for line in io.TextIOWrapper(raw, encoding="utf-8", newline="\n"):
                    text = json.loads(line)["text"]
                    if not text:
                        continue
                    ids = [*inner.encode(text, add_special_tokens=False).ids, eod]
                    file.write(np.array(ids, dtype=np.uint16).tobytes())
                    tokens += len(ids)
    return tokens, "tokenizers"


def ours(source, out, tokenizer, backend):
    from neox.corpus import prepare
    from neox.corpus.encode import Encoder
    from neox.tokenizer import Tokenizer

    read = Tokenizer.from_file(tokenizer)
    report = prepare(source, out, read, progress=False, workers=1, backend=backend)
    return report.tokens, Encoder(read, backend).backend


def only(who, source, out, tokenizer):
    started = time.perf_counter()
    if who == "loop":
        tokens, backend = loop(source, out, tokenizer)
    else:
        tokens, backend = ours(source, out, tokenizer, "auto" if who == "neox" else "tokenizers")
    seconds = time.perf_counter() - started
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    print(json.dumps({"seconds": seconds, "tokens": tokens, "backend": backend, "peak": peak}))


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("only="):
        only(sys.argv[1].partition("=")[2], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
    else:
        given = dict(argument.split("=", 1) for argument in sys.argv[1:])
        published = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "20B_tokenizer.json"
        main(
            [int(size) for size in given.get("sizes", "10,100,1000").split(",")],
            int(given.get("peer", 10)),
            int(given.get("turns", 3)),
            given.get("tokenizer", str(published)),
        )
