"""What is read: tokenizer and data."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from neox.config.options import Section
from neox.config.sections.types import (
    NotNegative,
    NotNegativeFloat,
    OptionalInt,
    OptionalStr,
    Positive,
    Strings,
    Weights,
    none,
)


class TokenizerConfig(Section):
    """Where the tokenizer comes from, or how one is trained on the text."""

    path: OptionalStr = None
    """A tokenizer.json; none = one is trained on the text."""
    vocab_size: Positive = 8192
    """Number of tokens when one is trained."""
    special_tokens: Strings = ()
    """Special tokens after <|endoftext|> and <|padding|>, in this order, when one is trained."""
    space_runs: NotNegative = 24
    """Longest run of spaces that is a token of its own, when one is trained; 0 = none is."""
    digits: Literal["joined", "single"] = "joined"
    """single lets no token hold two digits; joined splits as GPT-2 does. When one is trained."""
    normalizer: Literal["nfc", "none"] = "nfc"
    """nfc composes characters, as GPT-NeoX-20B's does; none gives every text back as it was. When one is trained."""

    @property
    def training(self) -> dict[str, Any]:
        """What `train_bpe` is called with, besides the texts."""
        return self.model_dump(exclude={"path"})


class PrepareConfig(Section):
    """Options of `prepare`: how text becomes tokens, and which documents are left out."""

    text_key: str = "text"
    """Key of the text in JSON lines; its column in Parquet files and data sets."""
    append_eod: bool = True
    """End each document with the end-of-document token."""
    special_in_text: Literal["token", "text"] = "token"
    """What the spelling of a special token in a document becomes: that token, which may end the document, or text."""
    on_error: Literal["fail", "skip"] = "fail"
    """What cannot be read: fail stops there, skip leaves it out, counts it and reports it."""
    backend: Literal["auto", "gigatoken", "tokenizers"] = "auto"
    """Library that encodes text; auto = gigatoken where it is installed and gives the ids of tokenizers."""
    workers: NotNegative = 0
    """Processes that encode text; 0 = one a core."""
    dedup: Annotated[Literal["exact", "minhash"] | None, BeforeValidator(none)] = None
    """Documents left out: exact, those of the same text as an earlier one; minhash, those of nearly the same words."""
    decontaminate: Strings = ()
    """Evaluation sets whose text is cut out of documents: .jsonl or .txt files, or tasks of lm-evaluation-harness."""


class DataConfig(PrepareConfig):
    """What is read, and in what order."""

    train: Strings = ()
    """For training: .bin/.idx prefixes (what `neox prepare` writes), or text: files, folders, hf:OWNER/NAME."""
    valid: Strings = ()
    """The same, held out for evaluation."""
    seq_length: Positive = 256
    """Tokens per sample."""
    order: Literal["permuted", "megatron", "preshuffled"] = "permuted"
    """permuted: a keyed permutation of the samples, without index files. megatron: gpt-neox's order, bit for bit.
    preshuffled: documents are samples of seq_length + 1 tokens, read as they stand."""
    num_samples: OptionalInt = Field(default=None, gt=0)
    """Samples that the megatron order is made for, and depends on; none = train.steps * train.global_batch_size."""
    weights: Weights = ()
    """Shares of data.train's entries in the samples, one each; without them permuted pools all text and megatron
    takes each entry alike. A resumed run may change them: the new ones hold from there on."""
    weigh: Literal["given", "documents", "pile"] = "given"
    """Where the shares come from: given as data.weights; the numbers of documents, with data.alpha as exponent; or the
    Pile's published weights, where each entry is one of its components."""
    alpha: NotNegativeFloat = 1.0
    """Exponent of weigh=documents: gpt-neox's weighted_sampler_alpha."""
    cache: OptionalStr = None
    """Folder that the megatron order's large arrays are kept in and read from; none = RUN/order."""
    split: OptionalStr = None
    """Shares of each data.train entry's documents for training, validation and test, in that order, such as
    "995,4,1"; none = all is training text."""
    segments: bool = False
    """Documents that share a sample do not see each other."""

    @property
    def fractions(self) -> tuple[float, float, float] | None:
        """What `split` gives to training, validation and test; together 1. Raises ValueError where it cannot be read.

        Split by commas or else slashes, parts that are missing are 0, as gpt-neox reads it.
        """
        if self.split is None:
            return None
        wrong = f'split: "{self.split[:60]}" must be up to three shares, such as "995,4,1", the first of them above 0'
        try:
            shares = [float(share) for share in self.split.split("," if "," in self.split else "/")]
        except ValueError:
            raise ValueError(wrong) from None
        shares += [0.0] * (3 - len(shares))
        total = sum(shares)
        if len(shares) != 3 or not (shares[0] > 0 and min(shares) >= 0 and total < float("inf")):
            raise ValueError(wrong)
        train, valid, test = (share / total for share in shares)
        return train, valid, test

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.weights and self.weigh != "given":
            raise ValueError(f"weigh: {self.weigh} and data.weights both give the shares; leave out one of them")
        if self.order == "preshuffled" and (self.weights or self.weigh != "given"):
            raise ValueError("order: preshuffled samples are read as they stand; leave out data.weights and data.weigh")
        if self.weights and self.train and len(self.weights) != len(self.train):
            raise ValueError(f"weights: {len(self.weights)} for {len(self.train)} entries of data.train; give one each")
        if self.fractions and self.valid:
            raise ValueError("split: holds out a part of data.train; leave out one of data.split and data.valid")
        return self
