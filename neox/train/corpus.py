"""From what `data.train` and `data.valid` name to token files: prefixes as they are, text tokenized into the run."""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from neox.config import Config
from neox.data import prepare, read_documents
from neox.tokenizer import Tokenizer, train_bpe


@dataclass(frozen=True)
class TokenFiles:
    train: list[Path]
    valid: list[Path]


def _is_prefix(name: str) -> bool:
    return Path(f"{name}.idx").exists()


def token_files(config: Config, run: Path, quiet: bool = False) -> TokenFiles:
    """Prefixes of .bin/.idx pairs for training and held-out text.

    Text files (.txt, .jsonl) are tokenized into RUN/data once, with `tokenizer.path`, or with a tokenizer that is
    trained on the training text. The tokenizer goes to RUN/tokenizer.json, so that the run is complete in itself.
    Raises ValueError where nothing is named, or the model has fewer vocabulary rows than the tokenizer.
    """
    data = config.data
    if not data.train:
        raise ValueError("data.train is empty: name .bin/.idx prefixes (see `neox prepare`) or text files")
    text = [name for name in (*data.train, *data.valid) if not _is_prefix(name)]
    tokenizer = _tokenizer(config, run, bool(text), quiet)
    if tokenizer and tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, model.vocab_size is {config.model.vocab_size}: "
            f"set model.vocab_size={tokenizer.padded_vocab_size()}"
        )
    found: dict[str, list[Path]] = {"train": [], "valid": []}
    for kind, names in (("train", data.train), ("valid", data.valid)):
        for number, name in enumerate(names):
            prefix = Path(name) if _is_prefix(name) else run / "data" / f"{kind}-{number}"
            if not _is_prefix(str(prefix)):
                assert tokenizer is not None
                prefix.parent.mkdir(parents=True, exist_ok=True)
                prepare(
                    [name], prefix, tokenizer, text_key=data.text_key, append_eod=data.append_eod, progress=not quiet
                )
            found[kind].append(prefix)
    return TokenFiles(found["train"], found["valid"])


def _tokenizer(config: Config, run: Path, needed: bool, quiet: bool) -> Tokenizer | None:
    kept = run / "tokenizer.json"
    if kept.exists():
        return Tokenizer.from_file(kept)
    beside = Path(f"{config.data.train[0]}-tokenizer.json")  # where `neox prepare` leaves the one it trained
    if config.tokenizer.path:
        tokenizer = Tokenizer.from_file(config.tokenizer.path)
    elif beside.exists():
        tokenizer = Tokenizer.from_file(beside)
    elif needed:
        documents = chain.from_iterable(
            read_documents(name, config.data.text_key) for name in config.data.train if not _is_prefix(name)
        )
        tokenizer = train_bpe(documents, config.tokenizer.vocab_size, progress=not quiet)
    else:
        return None
    tokenizer.save(kept)
    return tokenizer
