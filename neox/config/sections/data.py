"""Options of the tokenizer and the data."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from neox.config.options import Section
from neox.config.sections import (
    NotNegative,
    NotNegativeFloat,
    OptionalInt,
    OptionalStr,
    Positive,
    Strings,
    Weights,
    none,
)


class BPEConfig(Section):
    """Options of a BPE tokenizer that is trained on the text."""

    vocab_size: Positive = 8192
    """Number of tokens of a trained tokenizer, special tokens included; fewer if the text has too few merges."""
    special_tokens: Strings = ()
    """Special tokens of a trained tokenizer: ids 2, 3, .. after <|endoftext|> = 0 and <|padding|> = 1."""
    space_runs: NotNegative = 24
    """Longest run of spaces that a trained tokenizer has as one token, at the end of the ids; 0 = no such tokens."""
    digits: Literal["joined", "single"] = "joined"
    """Digits in a trained tokenizer: joined splits text as GPT-2 does, single lets no token hold two digits."""
    normalizer: Literal["nfc", "none"] = "nfc"
    """Normalization of a trained tokenizer: nfc as in GPT-NeoX-20B's; none gives every text back byte for byte."""


class TokenizerConfig(BPEConfig):
    """Source of the tokenizer, or options to train one on the text."""

    path: OptionalStr = None
    """File tokenizer.json to encode with; none = train a tokenizer on the text."""

    @property
    def training(self) -> dict[str, Any]:
        """Arguments of `train_bpe` besides the texts."""
        return self.model_dump(exclude={"path"})


class PrepareConfig(Section):
    """Options of `prepare`: tokenization, deduplication, decontamination."""

    text_key: str = "text"
    """Key of the text in JSON lines, or its column in Parquet files and data sets."""
    append_eod: bool = True
    """End each document with the end-of-document token."""
    special_in_text: Literal["token", "text"] = "token"
    """Meaning of a special token's spelling inside a document: token = that token, which may end the document; text =
    ordinary text."""
    on_error: Literal["fail", "skip"] = "fail"
    """Documents that cannot be read: fail = stop at the first; skip = leave them out, count and report them."""
    backend: Literal["auto", "gigatoken", "tokenizers"] = "auto"
    """Library that encodes text; auto = gigatoken if it is installed and gives the same ids as tokenizers."""
    workers: NotNegative = 0
    """Number of processes that encode text; 0 = one per core."""
    dedup: Annotated[Literal["exact", "minhash"] | None, BeforeValidator(none)] = None
    """Deduplication: exact removes documents with the text of an earlier one, minhash also near-duplicates; none = keep
    all."""
    decontaminate: Strings = ()
    """Evaluation sets whose text is cut out of documents: .jsonl or .txt files, or tasks of lm-evaluation-harness."""


class DataConfig(PrepareConfig):
    """Training data: sources, order and shares."""

    train: Strings = ()
    """Training data: .bin/.idx prefixes (what `neox prepare` writes), or text: files, folders, URLs, hf:OWNER/NAME."""
    valid: Strings = ()
    """Held-out data for evaluation during training, in the forms of data.train."""
    seq_length: Positive = 256
    """Tokens per sample."""
    order: Literal["permuted", "megatron", "preshuffled"] = "permuted"
    """Order of the samples. permuted: a keyed permutation, without index files. megatron: gpt-neox's, bit for bit.
    preshuffled: documents are samples of seq_length + 1 tokens, read as they stand."""
    num_samples: OptionalInt = Field(default=None, gt=0)
    """Number of samples that order=megatron is built for and depends on; none = train.steps *
    train.global_batch_size."""
    weights: Weights = ()
    """Share of each entry of data.train in the samples. Without weights, order=permuted pools all text, order=megatron
    takes each entry alike. A resumed run may change them; the new weights hold from there on."""
    weigh: Literal["given", "documents", "pile"] = "given"
    """Source of the shares: given = data.weights; documents = numbers of documents, with exponent data.alpha; pile =
    the Pile's published weights, with one of its components per entry."""
    alpha: NotNegativeFloat = 1.0
    """Exponent of the shares that weigh=documents computes: gpt-neox's weighted_sampler_alpha."""
    cache: OptionalStr = None
    """Folder for the large arrays of order=megatron, reused by later runs; none = RUN/order."""
    split: OptionalStr = None
    """Shares of each data.train entry's documents for training, validation and test, in that order, such as
    "995,4,1"; none = all of them train."""
    segments: bool = False
    """Hide documents that share a sample from each other: attention stays within a document."""

    @property
    def fractions(self) -> tuple[float, float, float] | None:
        """Shares of training, validation and test from `split`, with sum 1.

        Separators are commas or else slashes; missing parts are 0, as gpt-neox reads it. Raises ValueError.
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
