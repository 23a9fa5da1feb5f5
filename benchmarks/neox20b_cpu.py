"""GPT-NeoX-20B on one machine's CPU: written in the published 46 shards, loaded quantized from a cold disk, and run.

    python benchmarks/neox20b_cpu.py [preset=neox-20b] [kind=int4] [folder=neox20b] [tokens=24] [keep=false]

Disk: 41.1 GB (fp16, the published layout: embedding, 44 layers, norm and head; values seeded and random, no sparse
file). The folder is written once and used again if it is there; keep=false removes it at the end.

Printed: seconds to read all shards (the limit of loading, page cache dropped before), seconds to load (dropped again),
peak anonymous and file-backed resident memory (sampled from /proc every 5 ms) and tokens/s of greedy decoding, with the
bytes of weights that a token reads beside the best read bandwidth measured here in the same process.
"""

import json
import os
import re
import shutil
import statistics
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file

from neox.checkpoint import families, load
from neox.config import ModelConfig, load_config
from neox.generate import Engine, Sampling
from neox.generate.rate import bytes_read
from neox.model.decoder import GPTNeoX, init_std
from neox.quantization.packed import packing, quantize
from neox.system.files import write_atomic
from neox.system.machine import processor, read_speed

BLOCK = 16 << 20  # bytes read at a time


def write(config: ModelConfig, folder: Path) -> None:
    """A checkpoint in the layout of the released one: a shard for the embedding, one a layer, one for the rest."""
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in GPTNeoX(config).named_parameters()}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        layer = re.match(r"layers\.(\d+)\.", name)
        number = int(layer[1]) + 2 if layer else 1 if name.startswith("embed_in") else config.num_hidden_layers + 2
        shards.setdefault(f"model-{number:05d}-of-{config.num_hidden_layers + 2:05d}.safetensors", []).append(name)
    folder.mkdir(parents=True)
    index = {}
    for number, (file, names) in enumerate(track(shards.items(), "writing", console=Console(stderr=True))):
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for name in names:
            if "norm" in name or name.endswith("bias"):
                value = torch.full(shapes[name], float(name.endswith("norm.weight")), dtype=torch.float16)
            else:
                # Uniform, of the standard deviation that training starts with: ten times as fast as normal.
                reach = 3**0.5 * init_std(config, name)
                value = torch.empty(shapes[name]).uniform_(-reach, reach, generator=generator).half()
            (tensors[families.their_names(config, name)[0]],) = (value,)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        with open(folder / file, "rb+") as written:
            os.fsync(written.fileno())
        drop(folder / file)
        index |= dict.fromkeys(tensors, file)
    write_atomic(folder / "config.json", json.dumps(families.write_config(config, torch.float16, 0)).encode())
    table = {"metadata": {}, "weight_map": index}  # last: the folder is whole where it is there
    write_atomic(folder / "model.safetensors.index.json", json.dumps(table).encode())


def drop(file: Path) -> None:
    """Let go of what the page cache holds of a file."""
    handle = os.open(file, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def read_all(files: list[Path]) -> float:
    """Seconds to read files from one end to the other."""
    buffer, started = bytearray(BLOCK), time.perf_counter()
    for file in files:
        with open(file, "rb", buffering=0) as source:
            while source.readinto(buffer):
                pass
    return time.perf_counter() - started


class Peak:
    """The highest resident memory while inside, in bytes: anonymous, and backed by files."""

    def __enter__(self) -> "Peak":
        self.anonymous = self.files = 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.ended.wait(0.005):
            with open("/proc/self/status") as status:
                found = {
                    line[:8]: int(line.split()[1]) * 1024 for line in status if line.startswith(("RssAnon", "RssFile"))
                }
            self.anonymous = max(self.anonymous, found["RssAnon:"])
            self.files = max(self.files, found["RssFile:"])

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    preset, kind, folder = (
        given.get("preset", "neox-20b"),
        given.get("kind", "int4"),
        Path(given.get("folder", "neox20b")),
    )
    config = load_config(preset).model
    if not (folder / "model.safetensors.index.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        started = time.perf_counter()
        write(config, folder)
        print(f"written in {time.perf_counter() - started:.0f} s")
    files = sorted(folder.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    for file in files:
        drop(file)
    reading = read_all(files)
    for file in files:
        drop(file)
    with Peak() as peak:
        started = time.perf_counter()
        model = quantize(load(folder, transform=packing(kind))[0], kind)
        loading = time.perf_counter() - started
        engine = Engine(model, slots=1)
        prompt, count = list(range(1000, 1016)), int(given.get("tokens", 24))
        engine.generate([prompt], Sampling(max_tokens=2, temperature=0, stop_at_eod=False))
    # Outside: the thread that samples memory would take its time from a core.
    times = [time.perf_counter()]
    sampling = Sampling(max_tokens=count, temperature=0, stop_at_eod=False)
    for _ in engine.events([prompt[::-1]], [sampling], stream=False):
        times.append(time.perf_counter())
    steps = [after - before for before, after in pairwise(times[1:])]
    best = read_speed(5.0)
    read = bytes_read(model)
    speed = 1 / statistics.median(steps)
    print(
        f"""
{preset} in {kind} on {processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}

| what | figure |
|---|---|
| checkpoint | {len(files)} shards, {size / 1e9:.1f} GB |
| reading it from disk | {reading:.0f} s, {size / reading / 1e9:.2f} GB/s |
| loading and quantizing it, cold | {loading:.0f} s, {loading / reading:.2f} times the reading |
| peak anonymous memory | {peak.anonymous / 2**30:.2f} GiB |
| peak file-backed memory | {peak.files / 2**30:.2f} GiB |
| prompt of {len(prompt)} and first token | {times[1] - times[0]:.2f} s |
| decoding, median of {len(steps)} | {speed:.2f} tokens/s |
| weights read a token | {read / 1e9:.2f} GB |
| read bandwidth used | {read * speed / 1e9:.1f} of {best / 1e9:.1f} GB/s, {read * speed / best:.0%} |
"""
    )
    if given.get("keep") != "true":
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
