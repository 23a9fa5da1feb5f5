"""Token files of a run: prefixes are used as they are, text is tokenized into the run."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from neox.config import Config
from neox.corpus import prepare, read_documents
from neox.corpus.readers import Name, Source, find_sources
from neox.data.datasets import check_named
from neox.data.manifest import Manifest
from neox.data.token_file import beside, pair
from neox.tokenizer import Tokenizer, train_bpe


@dataclass(frozen=True)
class TokenFiles:
    train: list[Path]
    valid: list[Path]


def _is_prefix(name: str) -> bool:
    """Tell whether a name is a prefix, also where half of the pair is missing.

    Reading that half as text is not what its user meant.
    """
    return name.endswith((".bin", ".idx")) or (bool(name) and any(path.exists() for path in pair(name)))


def _whole(prefix: Path) -> bool:
    return pair(prefix)[1].exists()


def named_files(config: Config, run: Path) -> list[tuple[str, str, Path]]:
    """(kind, name, token-file prefix) for each entry of data.train and data.valid."""
    return [
        (kind, name, Path(name) if _is_prefix(name) else run / "data" / f"{kind}-{number}")
        for kind, names in (("train", config.data.train), ("valid", config.data.valid))
        for number, name in enumerate(names)
    ]


def padded_vocabulary(config: Config) -> int | None:
    """Vocabulary size that the tokens or the tokenizer of a new run need, padded as gpt-neox pads it; None for unknown.

    128 rows for each process of tensor parallelism share a boundary.
    """
    sizes = []
    for name in config.data.train:
        if _is_prefix(name) and (manifest := Manifest.read_sound(name)):
            sizes.append(manifest.vocab_size or 0)
    if config.tokenizer.path:
        sizes.append(Tokenizer.from_file(config.tokenizer.path).vocab_size)
    if not any(sizes):
        return None
    multiple = 128 * config.parallel.tp
    return -(-max(sizes) // multiple) * multiple


def token_files(config: Config, run: Path, quiet: bool = False) -> TokenFiles:
    """Prefixes of .bin/.idx pairs for training and held-out text.

    Text (files, folders, data sets: see `find_sources`) is tokenized into RUN/data once, with `tokenizer.path`, or
    with a tokenizer that is trained on the training text. The tokenizer goes to RUN/tokenizer.json, so that the run is
    complete in itself. What could not be read and was left out is said on stderr.
    Raises ValueError where the model has fewer vocabulary rows than the tokenizer or the data need, where RUN/data
    was made from other text, and where one tokenizer cannot have made all of the data.
    """
    check_named(config)
    data, entries = config.data, named_files(config, run)
    text = {name for _, name, _ in entries if not _is_prefix(name)}
    sources: dict[Path, Source] = {}
    for kind in ("train", "valid"):
        absent = {prefix: name for k, name, prefix in entries if k == kind and name in text and not _whole(prefix)}
        if absent:  # reads no text yet: a file that is missing is missed at once
            sources |= zip(absent, find_sources(list(absent.values()), data.text_key, data.on_error), strict=True)
    to_train_on = [sources.get(prefix, name) for kind, name, prefix in entries if kind == "train"]
    tokenizer = _tokenizer(config, run, to_train_on, bool(text), quiet)
    if tokenizer and tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, model.vocab_size is {config.model.vocab_size}: "
            f"set model.vocab_size={tokenizer.padded_vocab_size()}"
        )
    prefixes: dict[str, list[Path]] = {"train": [], "valid": []}
    for kind, name, prefix in entries:
        if name in text and not _whole(prefix):
            assert tokenizer is not None
            prefix.parent.mkdir(parents=True, exist_ok=True)
            report = prepare(sources[prefix], prefix, tokenizer, data, progress=not quiet)
            for line in report.left_out():
                print(f"{name}: {line}", file=sys.stderr)
        manifest = Manifest.read_sound(prefix)
        if not manifest or not manifest.of_prepare:
            manifest = Manifest()
        paths = [source["path"] for source in manifest.sources]
        if name in text and paths not in ([], [name]):
            raise ValueError(
                f"{prefix}: holds the tokens of {paths[0]}, data.{kind} names {name}: a run keeps its text, "
                "choose another out="
            )
        if tokenizer and manifest.of_prepare and manifest.tokenizer_sha256 != tokenizer.sha256:
            raise ValueError(
                f"{prefix}: made with another tokenizer than {run / 'tokenizer.json'}: "
                "set tokenizer.path to the one it was made with, or prepare it again"
            )
        if (manifest.vocab_size or 0) > config.model.vocab_size:
            raise ValueError(
                f"{prefix}: made with {manifest.vocab_size} tokens, model.vocab_size is {config.model.vocab_size}: "
                f"set model.vocab_size={manifest.vocab_size} or more"
            )
        prefixes[kind].append(prefix)
    return TokenFiles(prefixes["train"], prefixes["valid"])


def _tokenizer(config: Config, run: Path, train: Sequence[Name], needed: bool, quiet: bool) -> Tokenizer | None:
    """Find or train the run's tokenizer; None if not `needed`.

    It is the run's own, the configured one, or one trained on the sources `train`.
    """
    saved = run / "tokenizer.json"
    if saved.exists():
        return Tokenizer.from_file(saved)
    found = beside(config.data.train[0], "-tokenizer.json")  # where `neox prepare` leaves the one it trained
    if config.tokenizer.path:
        tokenizer = Tokenizer.from_file(config.tokenizer.path)
    elif found.exists():
        tokenizer = Tokenizer.from_file(found)
    elif needed:
        if made := next((name for name in config.data.train if _is_prefix(name)), None):
            raise ValueError(
                f"{made}: is tokens already, and the text beside it needs the same tokenizer: set tokenizer.path"
            )
        documents = read_documents(train, config.data.text_key, config.data.on_error)
        tokenizer = train_bpe(documents, progress=not quiet, **config.tokenizer.training)
    else:
        return None
    tokenizer.save(saved)
    return tokenizer
