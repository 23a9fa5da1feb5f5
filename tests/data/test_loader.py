"""Batches over ranks, and packed documents that do not see each other: against the documents run alone."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from neox.config import ModelConfig
from neox.data import Batch, Loader, TokenDataset, TokenWriter
from neox.data.megatron import MegatronDataset
from neox.model import IGNORED
from neox.model.decoder import GPTNeoX
from tests.corpus.corpora import documents, sizes_of_documents, write_pair

FIELDS = ("tokens", "labels", "positions", "segments")


class Counting:
    """Sample s is the token s, again and again; no file behind it."""

    def __init__(self, seq_length: int = 3, segments: bool = False) -> None:
        self.seq_length, self.segments = seq_length, segments

    def sample(self, samples):
        return np.repeat(np.asarray(samples, dtype=np.int64)[:, None], self.seq_length + 1, axis=1)

    def documents(self, samples):
        return np.zeros((len(np.asarray(samples)), self.seq_length + 1), dtype=np.int64)


def real(batch: Batch) -> list[int]:
    """The samples of a batch of a Counting dataset, without filler, which must hold nothing to learn."""
    filler = (batch.labels == IGNORED).all(dim=1)
    assert not (batch.labels == IGNORED)[~filler].any()
    assert not batch.tokens[filler].any()
    return batch.tokens[~filler, 0].tolist()


@settings(deadline=None)
@given(
    batch=st.integers(1, 7),
    ranges=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=5),
    steps=st.tuples(st.integers(0, 6), st.integers(1, 4)),
)
def test_loader_skips_ranges_of_samples(batch, ranges, steps) -> None:
    """Against a list of all sample numbers from which those of the ranges are struck out."""
    loader = Loader(Counting(), batch, [(first, first + size) for first, size in ranges])

    def left(loader, *more):
        struck = {n for first, size in ranges for n in range(first, first + size)}.union(*more)
        numbers = [n for n in range(400) if n not in struck]
        for step in range(12):
            assert real(loader.batch(step)) == numbers[step * batch : (step + 1) * batch]
            assert loader.position(step) == numbers[step * batch]
        return numbers

    before = left(loader)
    first, last = steps[0], sum(steps)
    # What lies between them was stepped over before.
    left(loader.step_over(first, last), range(before[first * batch], before[last * batch - 1] + 1))


@settings(deadline=None)
@given(
    batch=st.integers(1, 40),
    ranks=st.integers(1, 9),
    micro=st.integers(1, 9),
    step=st.integers(0, 1000),
    segments=st.booleans(),
)
def test_microbatches_of_a_step_on_any_number_of_ranks(batch, ranks, micro, step, segments) -> None:
    loader = Loader(Counting(segments=segments), batch)
    parts = [list(loader.microbatches(step, micro, rank, ranks)) for rank in range(ranks)]
    blocks = [[sample for part in own for sample in real(part)] for own in parts]
    # Each rank a contiguous block of ceil(B / ranks), in order; the last ones may have less, or nothing.
    share = -(-batch // ranks)
    everything = list(range(step * batch, (step + 1) * batch))
    assert blocks == [everything[rank * share : (rank + 1) * share] for rank in range(ranks)]
    assert [sample for block in blocks for sample in block] == everything
    shapes = [[part.tokens.shape for part in own] for own in parts]
    assert all(own == shapes[0] for own in shapes)
    assert len(shapes[0]) == -(-share // micro)
    assert [rows for rows, _ in shapes[0]] == [min(micro, share - start) for start in range(0, share, micro)]
    for own in parts:
        for part in own:
            assert (part.segments is not None) == segments
            for name in FIELDS if segments else FIELDS[:3]:
                assert getattr(part, name).shape == part.tokens.shape
                assert getattr(part, name).dtype == torch.int64
            assert part.positions.tolist() == [[0, 1, 2]] * len(part.tokens)


@pytest.mark.parametrize(("batch", "ranks", "micro", "filler"), [(1538, 12, 4, 10), (7, 2, 4, 1), (7, 2, 2, 1)])
def test_microbatches_pad_any_batch_size_on_any_number_of_ranks(
    batch: int, ranks: int, micro: int, filler: int
) -> None:
    """1538 is the batch of GPT-NeoX-20B as its paper gives it: 12 ranks of 129, in 33 microbatches of 4."""
    loader = Loader(Counting(), batch)
    parts = [part for rank in range(ranks) for part in loader.microbatches(3, micro, rank, ranks)]
    assert [sample for part in parts for sample in real(part)] == list(range(3 * batch, 4 * batch))
    assert sum(len(part.tokens) for part in parts) == batch + filler
    assert sum(int((part.labels != IGNORED).sum()) for part in parts) == batch * 3


def test_ranks_are_checked() -> None:
    for rank, ranks in ((1, 1), (-1, 2), (0, 0)):
        with pytest.raises(AssertionError):
            list(Loader(Counting(), 4).microbatches(0, 1, rank, ranks))


# --- segments --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(sizes=sizes_of_documents, seq_length=st.integers(1, 12), order=st.sampled_from(["permuted", "megatron"]))
def test_segments_positions_and_labels(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], seq_length: int, order: str
) -> None:
    sizes = [*sizes, 13]
    part = documents(tmp_path_factory.mktemp("data") / "x", sizes)
    if order == "megatron":
        dataset = MegatronDataset(part, seq_length, 3, 20, segments=True)
        plain = MegatronDataset(part, seq_length, 3, 20)
    else:
        dataset = TokenDataset([part], seq_length, 3, segments=True)
        plain = TokenDataset([part], seq_length, 3)
    batch, seen = Loader(dataset, 20).batch(0), Loader(plain, 20).batch(0)
    assert torch.equal(batch.tokens, seen.tokens)
    assert seen.segments is None
    owner = [number for number, size in enumerate(sizes) for _ in range(size)]
    for tokens, next_tokens, labels, positions, segments in zip(
        batch.tokens.tolist(),
        seen.labels.tolist(),
        batch.labels.tolist(),
        batch.positions.tolist(),
        batch.segments.tolist(),
        strict=True,
    ):
        number = position = 0
        for at, (token, label) in enumerate(zip(tokens, next_tokens, strict=True)):
            # Tokens count up through the file: a document goes on where the next token is the next number and its own.
            assert (segments[at], positions[at]) == (number, position)
            goes_on = label == token + 1 and owner[label] == owner[token]
            assert labels[at] == (label if goes_on else IGNORED)
            number, position = (number, position + 1) if goes_on else (number + 1, 0)


def pieces(batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor, tuple[int, slice]]]:
    """Tokens and labels of each document in the rows, and where it lies."""
    found = []
    for row, segments in enumerate(batch.segments):
        ends = [0, *(1 + torch.nonzero(segments.diff()).flatten()).tolist(), len(segments)]
        for start, stop in pairwise(ends):
            where = slice(start, stop)
            found.append((batch.tokens[row : row + 1, where], batch.labels[row : row + 1, where], (row, where)))
    return found


@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "serial"])
@pytest.mark.parametrize("order", ["permuted", "megatron"])
def test_segments_packed_documents_equal_documents_alone(tmp_path: Path, parallel: bool, order: str) -> None:
    """fp32, on a small model: logits, loss and gradients to 1e-6 of their largest entry."""
    sizes = np.random.default_rng(0).integers(0, 14, 30).tolist()
    part = documents(tmp_path / "x", sizes)
    if order == "megatron":
        dataset = MegatronDataset(part, 24, 3, 6, segments=True)
    else:
        dataset = TokenDataset([part], 24, 3, segments=True)
    batch = Loader(dataset, 4).batch(0)
    assert len(pieces(batch)) > 8
    shape = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "use_parallel_residual": parallel}
    model = GPTNeoX(ModelConfig(**shape, num_attention_heads=2, rotary_pct=0.5)).initialize(3)
    count = int((batch.labels != IGNORED).sum())

    packed = model(batch.tokens, batch.positions, segments=batch.segments)
    loss = F.cross_entropy(packed.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED)
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.zero_grad(set_to_none=True)
    alone_loss = torch.zeros(())
    for tokens, labels, (row, where) in pieces(batch):
        alone = model(tokens)
        assert (alone[0] - packed[row, where]).abs().max() <= 1e-6 * packed.abs().max()
        assert labels[0, :-1].tolist() == tokens[0, 1:].tolist()  # all of a document but its first token is learned
        learned = alone[0, :-1], tokens[0, 1:]
        if where.stop == batch.tokens.shape[1] and labels[0, -1] != IGNORED:  # cut by the row's end: it goes on
            learned = alone[0], labels[0]
        piece_loss = F.cross_entropy(*learned, reduction="sum") / count
        piece_loss.backward()
        alone_loss += piece_loss.detach()
    assert abs(alone_loss - loss) <= 1e-6 * loss
    for name, parameter in model.named_parameters():
        assert (parameter.grad - gradients[name]).abs().max() <= 1e-6 * gradients[name].abs().max(), name

    crossing = model(batch.tokens, batch.positions)  # without segments they do see each other
    assert (crossing - packed).abs().max() > 1e-3 * packed.abs().max()


def test_segments_learn_the_end_of_document_token_and_mask_the_next_label(tmp_path: Path) -> None:
    """Documents 5 6 7 0 and 8 9 0 and 5 0, with 0 as end of document, in one row."""
    with TokenWriter(tmp_path / "x", "uint16") as writer:
        for document in ([5, 6, 7, 0], [8, 9, 0], [], [5, 0]):
            writer.add_document(document)
    batch = Loader(TokenDataset([tmp_path / "x"], 8, 0, segments=True), 1).batch(0)
    assert batch.tokens.tolist() == [[5, 6, 7, 0, 8, 9, 0, 5]]
    assert batch.labels.tolist() == [[6, 7, 0, IGNORED, 9, 0, IGNORED, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]
    assert batch.segments.tolist() == [[0, 0, 0, 0, 1, 1, 1, 2]]


def test_segments_of_windows_into_the_middle_of_documents(tmp_path: Path) -> None:
    write_pair(tmp_path / "x", [10, 3, 8])
    batch = Loader(TokenDataset([tmp_path / "x"], 5, 0, "sequential", segments=True), 4).batch(0)
    assert batch.segments.tolist() == [[0] * 5, [0] * 5, [0, 0, 0, 1, 1], [0] * 5]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]
    assert batch.labels[1].tolist() == [6, 7, 8, 9, IGNORED]  # token 10 begins the next document
