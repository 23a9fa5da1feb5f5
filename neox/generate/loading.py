"""Loading a model into an engine: device, tensor parallelism, and the kind of its weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from neox.checkpoint import load, weights_dtype
from neox.checkpoint.model_loader import NoHead
from neox.checkpoint.weight_source import NO_HEAD
from neox.config import Config, DataConfig, ParallelConfig
from neox.generate.engine import Drafter, Engine
from neox.generate.sharded import ShardedEngine, worker_loop
from neox.generate.speculate import DraftModel, prompt_lookup
from neox.model.decoder import GPTNeoX
from neox.parallel import parallel_dims
from neox.parallel.inference import share, sharing
from neox.quantization import torchao_weights
from neox.quantization.kernels import FLOATS, Kind
from neox.quantization.kinds import KINDS
from neox.quantization.packed import lossless, packing, quantize
from neox.system.device import DTYPES, local_device, resolve_device
from neox.system.processes import OtherProcessFailed, Processes, joined_processes
from neox.tokenizer import Tokenizer

WEIGHTS = ("auto", "torch", *KINDS, "float8")
"""torch leaves the layers to torch; the others are kinds of `quantization.kinds`, on CUDA of `torchao_weights`."""


def load_engine(
    source: str | Path,
    device: str = "auto",
    dtype: str | None = None,
    weights: str = "auto",
    speculate: str = "none",
    draft: str | None = None,
    **options: Any,
) -> Engine:
    """Load `source` (any source of `checkpoint.load`) into an engine; `options` are the engine's.

    weights: on a CPU with compiled kernels, `auto` packs them in the type that they are stored in, without loss. On
    other devices, and with `dtype`, it leaves them to torch. float8 is for CUDA; the types of 16 and 32 bits are a
    `dtype` there. Weights are packed layer by layer during loading.
    speculate: `prompt` takes draft tokens from the text so far; `draft` is the source of a smaller draft model.
    Raises ValueError for any other word.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights}: must be one of {', '.join(WEIGHTS)}")
    drafter = _drafter(speculate)
    if draft and speculate != "none":
        raise ValueError("give speculate= or draft=, not both")
    model, tokenizer = _load(source, resolve_device(device), dtype, weights)
    if draft:
        smaller, words = _load(draft, resolve_device(device), dtype, weights)
        if words and tokenizer and words.sha256 != tokenizer.sha256:
            raise ValueError(
                f"draft={draft}: has another tokenizer than {source}: its draft tokens would be other ones"
            )
        drafter = DraftModel(smaller)
    return Engine(model, tokenizer, drafter=drafter, **options)


def _load(
    source: str | Path, device: torch.device, dtype: str | None, weights: str
) -> tuple[GPTNeoX, Tokenizer | None]:
    if weights == "torch" or (weights == "auto" and (device.type != "cpu" or dtype)):
        return _load_with_head(source, str(device), dtype)
    if dtype:
        raise ValueError(f"weights={weights}: says how weights are held: leave dtype={dtype} out")
    if device.type == "cuda":
        if weights in FLOATS:
            stored = next(name for name, dtype in DTYPES.items() if dtype == FLOATS[weights])
            return _load_with_head(source, str(device), stored)
        pack = torchao_weights.packing(cast(torchao_weights.Kind, weights), device)
        model, tokenizer = _load_with_head(source, str(device), "bf16", pack)
        return torchao_weights.compile_products(model), tokenizer
    if device.type != "cpu" or weights == "float8":
        where = "CUDA" if weights == "float8" else "a CPU or CUDA"
        raise ValueError(f"weights={weights}: is for {where}, not for {device.type}")
    kind = cast(Kind | None, lossless(weights_dtype(source)) if weights == "auto" else weights)
    model, tokenizer = _load_with_head(source, str(device), None, packing(kind) if kind else None)
    return quantize(model, kind) if kind else model, tokenizer


@contextmanager
def shared_engine(
    source: str | Path,
    tp: int = 1,
    device: str = "auto",
    dtype: str | None = None,
    weights: str = "auto",
    speculate: str = "none",
    draft: str | None = None,
    **options: Any,
) -> Iterator[Engine | None]:
    """The engine of `load_engine`, sharded over the `tp` processes that torchrun started.

    Rank 0 gets it. The other ranks stay inside the call, in `worker_loop`, until rank 0 leaves the block; then they get
    None. Raises ValueError where tp is not the number of processes, does not divide what it splits, or does not go
    with an option; the other ranks then raise OtherProcessFailed.
    """
    with joined_processes(device) as processes:
        if tp == processes.world == 1:
            yield load_engine(source, device, dtype, weights, speculate, draft, **options)
            return
        try:
            if weights not in ("auto", "torch") or draft:
                raise ValueError("parallel.tp: does not go with draft=, nor with packed weights: leave them out")
            model, tokenizer = _load_share(source, tp, local_device(device), dtype, processes)
        except ValueError:
            if processes.rank:
                raise OtherProcessFailed("rank 0 says so") from None
            raise
        if processes.rank:
            worker_loop(model)
            yield None
            return
        engine = ShardedEngine(model, tokenizer, drafter=_drafter(speculate), **options)
        try:
            yield engine
        except (ValueError, OSError):  # a user's error, between two passes
            engine.shutdown()
            raise
        engine.shutdown()


def _load_share(
    source: str | Path, tp: int, device: torch.device, dtype: str | None, processes: Processes
) -> tuple[GPTNeoX, Tokenizer | None]:
    parallel = ParallelConfig(tp=tp, dp_shard=1)
    mesh = parallel_dims(parallel, processes, device).axis("tp")
    assert mesh is not None
    model, tokenizer = _load_with_head(source, str(device), dtype, sharing(mesh))
    config = Config(
        model=model.config, parallel=parallel, data=DataConfig(seq_length=model.config.max_position_embeddings)
    )
    return share(model, config, mesh), tokenizer


def _drafter(speculate: str) -> Drafter | None:
    if speculate not in ("none", "prompt"):
        raise ValueError(f"speculate={speculate}: must be none or prompt")
    return prompt_lookup if speculate == "prompt" else None


def _load_with_head(source: str | Path, *options: Any) -> tuple[GPTNeoX, Tokenizer | None]:
    model, tokenizer = load(source, *options)
    if isinstance(model.embed_out, NoHead):
        raise ValueError(f"{source}: {NO_HEAD}")
    return model, tokenizer
