"""Hugging Face folders: config.json, safetensors shards with an index, tokenizer.json. Read, and written whole or not.

Weights stream tensor by tensor: peak memory is the model plus one tensor.
"""

import errno
import json
import os
import shutil
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neox.checkpoint import families
from neox.config import ModelConfig
from neox.model.decoder import GPTNeoX
from neox.system.files import byte_progress, sync_folder, write_error
from neox.system.machine import return_freed_memory
from neox.system.runtime import resolve_device, resolve_dtype
from neox.tokenizer import END_OF_TEXT, Tokenizer

SHARD_BYTES = 5 * 10**9
SHOWN = 10**9
"""From this many parameters, or bytes when writing, there is a progress bar."""
_OURS = (
    *("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says which file, what is wrong with it and what to do."""


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path}: not valid JSON ({error}); it may be truncated, fetch or write it again"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def find(source: str | Path) -> Path:
    """The folder of that name, or the hub's for an id such as EleutherAI/pythia-160m@step3000."""
    folder = Path(source)
    if not folder.exists():
        folder = _fetch(str(source))
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file; give the folder that holds config.json, or a run directory")
    return folder


def _fetch(source: str) -> Path:
    """The hub's folder for an id such as EleutherAI/pythia-160m@step3000."""
    name, _, revision = source.partition("@")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{source}: no such folder, and no hub id of the form OWNER/MODEL")
    from huggingface_hub import snapshot_download

    wanted = ["config.json", "tokenizer.json", "*.safetensors", "*.safetensors.index.json"]
    try:
        found = Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted))
        if not any(found.glob("*.safetensors")):
            found = Path(snapshot_download(name, revision=revision or None, allow_patterns=[*wanted, "*.bin*"]))
    except Exception as error:  # the hub's library lets those of its transport, of several libraries, through
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(
            f"{source}: cannot be fetched from the hub ({reason}); is {os.path.curdir}/{source} meant?"
        ) from None
    return found


def read_config(folder: Path) -> ModelConfig:
    """What the config.json of a Hugging Face folder says."""
    try:
        return families.read_config(read_json(folder / "config.json"))
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None


Transform = Callable[[str, torch.nn.Module], torch.nn.Module]
"""(name, nn.Linear or nn.Embedding) -> what takes its place, or the layer itself: how weights are packed while they are
loaded. A head and an embedding that share a weight are left alone."""


def load_huggingface(
    folder: Path, device: str = "cpu", dtype: str | torch.dtype | None = None, transform: Transform | None = None
) -> GPTNeoX:
    """The model of a Hugging Face folder, in evaluation mode.

    `transform` is called with each layer as soon as its weights are there: memory then holds what it made of the
    layers before, and one layer as it was stored. dtype None keeps the stored one on an accelerator and takes
    float32 on a CPU, where 16-bit products are slow.
    Raises CheckpointError naming the tensors that are missing, left over or of another shape, or the file that is cut.
    """
    config = read_config(folder)
    files = weight_files(folder)
    with torch.device("meta"):
        model = GPTNeoX(config)
    names = dict(model.named_parameters())
    wanted = {theirs: name for name in names for theirs in families.their_names(config, name)}
    check_names(folder, config, set(wanted), set(files))
    place = resolve_device(device)
    if dtype is None and place.type == "cpu":
        dtype = torch.float32

    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    total = sum(p.numel() for p in names.values())
    with byte_progress(total > SHOWN) as bar:
        task = bar.add_task("loading weights", total=None)
        for stored, tensor in _stream(
            {n: file for n, file in files.items() if families.canonical(config, n) in wanted}
        ):
            theirs = families.canonical(config, stored)
            name = wanted[theirs]
            if dtype is None:
                dtype = tensor.dtype
            dtype = resolve_dtype(dtype)
            bar.update(task, total=total * dtype.itemsize)
            group = families.their_names(config, name)
            rows, *rest = names[name].shape
            expected = [rows // len(group), *rest]
            if list(tensor.shape) != expected:
                raise CheckpointError(
                    f"{files[stored]}: tensor {stored} has shape {list(tensor.shape)}, config.json says {expected}: "
                    f"the weights and the config do not belong together"
                )
            # A copy, so that no parameter keeps a whole memory-mapped file alive.
            parts[name][theirs] = tensor.to(place, dtype, copy=True)
            bar.advance(task, parts[name][theirs].nbytes)
            if len(parts[name]) == len(group):
                pieces = parts.pop(name)
                module = _assign(model, name, families.fuse(config, [pieces[piece] for piece in group]))
                if transform:
                    transform_layer(model, module, transform)
    model.tie()
    return model.eval()


def _assign(model: GPTNeoX, name: str, value: Tensor) -> str:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, torch.nn.Parameter(value))
    return module


def transform_layer(model: GPTNeoX, name: str, transform: Transform) -> None:
    """Put in place of the module `name` what `transform` makes of it, if it is of those kinds and complete."""
    module = model.get_submodule(name)
    tied = model.config.tie_word_embeddings and name in ("embed_in", "embed_out")
    wanted = isinstance(module, torch.nn.Linear | torch.nn.Embedding) and not tied
    if wanted and not any(parameter.is_meta for parameter in module.parameters()):
        model.set_submodule(name, transform(name, module))
        del module
        return_freed_memory()


def weight_files(folder: Path) -> dict[str, Path]:
    """Which file holds which tensor."""
    for index, single in (
        ("model.safetensors.index.json", "model.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin"),
    ):
        if (folder / index).exists():
            table = read_json(folder / index).get("weight_map")
            if not isinstance(table, dict) or not all(_plain_name(file) for file in table.values()):
                raise CheckpointError(f"{folder / index}: its weight_map does not name files; fetch it again")
            absent = sorted({file for file in table.values() if not (folder / file).is_file()})
            if absent:
                raise CheckpointError(
                    f"{folder}: {len(absent)} shard(s) missing, the first is {absent[0]}; fetch again"
                )
            return {name: folder / file for name, file in table.items()}
        if (folder / single).exists():
            return dict.fromkeys(_names_in(folder / single), folder / single)
    raise CheckpointError(f"{folder}: no model.safetensors, its index, or pytorch_model.bin in this folder")


def _plain_name(file: object) -> bool:
    return isinstance(file, str) and bool(file) and Path(file).name == file


def broken(path: Path, error: Exception) -> CheckpointError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return CheckpointError(f"{path}: cannot be read ({reason}); it is truncated or no weight file, fetch it again")


def _names_in(path: Path) -> list[str]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                return list(file.keys())
        except SafetensorError as error:
            raise broken(path, error) from None
    return list(read_bin(path))


def read_bin(path: Path) -> dict[str, Tensor]:
    try:
        # torch before 1.6 wrote no zip file; only a zip file can be mapped.
        content = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except Exception as error:
        raise broken(path, error) from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: holds more than named tensors; it is no model's pytorch_model.bin")
    return content


def _stream(files: dict[str, Path]) -> Iterator[tuple[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    by_file: dict[Path, list[str]] = defaultdict(list)
    for name, path in files.items():
        by_file[path].append(name)
    for path, names in sorted(by_file.items()):
        if path.suffix != ".safetensors":
            content = read_bin(path)
            for name in names:
                if name not in content:
                    raise CheckpointError(f"{path}: the index names tensor {name}, which is not in the file")
                yield name, content[name]
            continue
        try:
            with safe_open(path, "pt") as file:
                for name in names:
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise broken(path, error) from None


def stored_dtype(folder: Path) -> torch.dtype:
    """The type of the first weight of a Hugging Face folder."""
    from safetensors import safe_open

    config = read_config(folder)
    for name, path in weight_files(folder).items():
        if families.canonical(config, name) == families.their_names(config, "embed_in.weight")[0]:
            if path.suffix != ".safetensors":
                return read_bin(path)[name].dtype
            with safe_open(path, "pt") as file:
                return file.get_slice(name)[:1].dtype
    raise CheckpointError(
        f"{folder}: no embedding among its weights: config.json and the weight files do not belong together"
    )


def check_names(folder: Path, config: ModelConfig, wanted: set[str], stored: set[str]) -> None:
    canonical = {families.canonical(config, name) for name in stored}
    missing = sorted(wanted - canonical)
    extra = sorted(name for name in canonical - wanted if not families.IGNORED.search(name))
    if config.tie_word_embeddings:
        extra = [name for name in extra if name not in ("embed_out.weight", "lm_head.weight")]
    for problem, names in (("is missing", missing), ("is not part of this model", extra)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise CheckpointError(
                f"{folder}: tensor {names[0]} {problem}{more}: config.json and the weight files do not belong together"
            )


def save_huggingface(
    model: GPTNeoX, path: str | Path, tokenizer: Tokenizer | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write the folder `path` that transformers loads: config, weights in safetensors shards, tokenizer.

    The folder appears whole or not at all. An older checkpoint under that name is replaced; a folder that holds
    anything else is left alone with a ValueError. A failed write (full disk) leaves no trace and raises OSError.
    """
    parameters = dict(model.named_parameters())
    with torch.device("meta"):
        whole = GPTNeoX(model.config)
    if absent := [name for name, _ in whole.named_parameters() if name not in parameters]:
        raise ValueError(f"{absent[0]} is not there as it was trained, but packed: save the model before quantizing it")
    dtype = next(iter(parameters.values())).dtype
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    write_huggingface(model.config, dtype, shapes, lambda name: parameters[name].detach(), path, tokenizer, shard_bytes)


def write_huggingface(
    config: ModelConfig,
    dtype: torch.dtype,
    shapes: Mapping[str, torch.Size],
    read: Callable[[str], Tensor],
    path: str | Path,
    tokenizer: Tokenizer | None,
    shard_bytes: int,
) -> None:
    """`save_huggingface` for weights that are fetched when their shard is written: `read(name)`, once each."""
    path = Path(path).resolve()  # a link stays one, and "." has a name
    if path.exists():
        strangers = [] if path.is_dir() else [path.name]
        if path.is_dir():
            strangers = [p.name for p in path.iterdir() if p.name not in _OURS and not _is_shard(p.name)]
        if strangers:
            raise ValueError(
                f"{path}: holds {sorted(strangers)[0]!r}, which is no part of a checkpoint: choose another"
            )
    eos = tokenizer.eod_id if tokenizer else 0
    written = families.write_config(config, dtype, eos)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir()
        _write_weights(config, dtype, shapes, read, fresh, shard_bytes)
        _write_json(fresh / "config.json", written)
        _write_json(fresh / "generation_config.json", {"bos_token_id": eos, "eos_token_id": eos})
        if tokenizer:
            tokenizer.save(fresh / "tokenizer.json")
            _write_json(fresh / "tokenizer_config.json", _tokenizer_config(config, tokenizer))
        _sync_files(fresh)
    except BaseException as error:
        shutil.rmtree(fresh, ignore_errors=True)
        if isinstance(error, OSError):
            raise write_error(error, path) from None
        raise
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        path.rename(old)
    fresh.rename(path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _is_shard(name: str) -> bool:
    return name.startswith("model-") and name.endswith(".safetensors")


def _tokenizer_config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    # Naming a token that tokenizer.json lacks would make transformers add it, with an id beyond the embedding.
    special = {} if tokenizer.eod_id is None else dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position_embeddings,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_weights(
    config: ModelConfig,
    dtype: torch.dtype,
    shapes: Mapping[str, torch.Size],
    read: Callable[[str], Tensor],
    folder: Path,
    shard_bytes: int,
) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    shards: list[list[str]] = [[]]
    sizes = [0]
    for name, shape in shapes.items():
        size = shape.numel() * dtype.itemsize
        if sizes[-1] and sizes[-1] + size > shard_bytes:
            shards.append([])
            sizes.append(0)
        sizes[-1] += size
        shards[-1].append(name)
    weight_map = {}
    with byte_progress(sum(sizes) > SHOWN) as bar:
        task = bar.add_task("writing weights", total=sum(sizes))
        for number, (shard, size) in enumerate(zip(shards, sizes, strict=True), 1):
            file = "model.safetensors"
            if len(shards) > 1:
                file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            try:
                stored = dict(piece for name in shard for piece in _pieces(config, name, read))
                save_file(stored, folder / file, metadata={"format": "pt"})
            except SafetensorError as error:
                # safetensors reports a full disk under its own name; users and the CLI know OSError.
                raise OSError(errno.EIO, str(error)) from None
            weight_map.update(dict.fromkeys(stored, file))
            del stored  # before the next shard is read
            bar.advance(task, size)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _pieces(config: ModelConfig, name: str, read: Callable[[str], Tensor]) -> Iterable[tuple[str, Tensor]]:
    """The stored tensors that our parameter `name` becomes."""
    theirs, value = families.their_names(config, name), read(name).cpu().contiguous()
    return zip(theirs, families.unfuse(config, value) if len(theirs) > 1 else [value], strict=True)


def _sync_files(folder: Path) -> None:
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    with suppress(OSError):
        sync_folder(folder)
