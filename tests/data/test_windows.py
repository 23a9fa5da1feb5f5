"""Windows, samples, batches: against slices of a plain list, and by counting what an epoch holds."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neox.data import Batch, Loader, PermutedOrder, TokenDataset, TokenWriter


def write(folder: Path, lengths: list[int]) -> tuple[list[Path], list[list[int]]]:
    """One token file a length; every token of all files is another number, so that each can be followed."""
    prefixes, streams, first = [], [], 0
    for number, length in enumerate(lengths):
        stream = list(range(first, first + length))
        first += length
        prefixes.append(folder / str(number))
        streams.append(stream)
        with TokenWriter(prefixes[-1], "int32") as writer:
            for start in range(0, length, 5):
                writer.add_document(stream[start : start + 5])
    return prefixes, streams


def slow_windows(streams: list[list[int]], seq_length: int) -> list[list[int]]:
    windows = []
    for stream in streams:
        start = 0
        while start + seq_length + 1 <= len(stream):
            windows.append(stream[start : start + seq_length + 1])
            start += seq_length
    return windows


corpora = st.lists(st.integers(0, 60), min_size=1, max_size=4)


@settings(deadline=None, max_examples=50)
@given(lengths=corpora, seq_length=st.integers(1, 20), seed=st.integers(0, 99), data=st.data())
def test_windows_and_samples(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_length: int, seed: int, data: st.DataObject
) -> None:
    prefixes, streams = write(tmp_path_factory.mktemp("data"), lengths)
    windows = slow_windows(streams, seq_length)
    if not windows:
        with pytest.raises(ValueError, match=f"has {max(lengths)} tokens; seq_length {seq_length} needs at least"):
            TokenDataset(prefixes, seq_length, seed)
        return
    dataset = TokenDataset(prefixes, seq_length, seed)
    n = len(windows)
    assert dataset.num_windows == n
    everything = dataset.sequential(np.arange(n))
    assert everything.dtype == np.int64
    assert everything.tolist() == windows
    assert dataset.sequential(n - 1).tolist() == [windows[-1]]
    samples = np.array(data.draw(st.lists(st.integers(0, 5 * n), max_size=10)), dtype=np.int64)
    expected = [windows[w] for w in PermutedOrder(n, seed)(samples)]
    assert dataset.sample(samples).tolist() == expected
    assert dataset.sample(samples).shape == (len(samples), seq_length + 1)
    plain = TokenDataset(prefixes, seq_length, seed, order="sequential")
    assert plain.sample(samples).tolist() == [windows[s % n] for s in samples]


@settings(deadline=None, max_examples=40)
@given(lengths=corpora, seq_length=st.integers(1, 20), epoch=st.integers(0, 5))
def test_every_token_is_a_label_once_an_epoch(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_length: int, epoch: int
) -> None:
    lengths = [*lengths, 30]
    prefixes, streams = write(tmp_path_factory.mktemp("data"), lengths)
    loader = Loader(TokenDataset(prefixes, seq_length, seed=3), 1)
    n = loader.dataset.num_windows
    labels = Counter()
    for step in range(epoch * n, (epoch + 1) * n):
        labels.update(loader.batch(step).labels.flatten().tolist())
    expected = Counter()
    for stream in streams:
        whole = (len(stream) - 1) // seq_length * seq_length if stream else 0
        expected.update(stream[1 : 1 + whole])  # all but the first token and the tail
    assert labels == expected


@settings(deadline=None, max_examples=40)
@given(
    batch_size=st.integers(1, 9),
    micro=st.integers(1, 12),
    step=st.integers(0, 50),
    seq_length=st.integers(1, 12),
)
def test_a_step_is_the_same_however_it_is_cut(
    tmp_path_factory: pytest.TempPathFactory, batch_size: int, micro: int, step: int, seq_length: int
) -> None:
    prefixes, _ = write(tmp_path_factory.mktemp("data"), [40, 25])
    dataset = TokenDataset(prefixes, seq_length, seed=5)
    loader = Loader(dataset, batch_size)
    batch = loader.batch(step)
    rows = torch.from_numpy(dataset.sample(np.arange(step * batch_size, (step + 1) * batch_size)))
    assert torch.equal(batch.tokens, rows[:, :-1])
    assert torch.equal(batch.labels, rows[:, 1:])
    assert torch.equal(batch.labels[:, :-1], batch.tokens[:, 1:])
    assert batch.positions.tolist() == [list(range(seq_length))] * batch_size
    assert batch.segments is None
    parts = list(loader.microbatches(step, micro))
    assert [len(part.tokens) for part in parts[:-1]] == [micro] * (len(parts) - 1)
    assert 1 <= len(parts[-1].tokens) <= micro
    starts = range(step * batch_size, (step + 1) * batch_size, micro)
    assert (batch.first, [part.first for part in parts]) == (step * batch_size, list(starts))
    for name in ("tokens", "labels", "positions"):
        whole = getattr(batch, name)
        assert whole.dtype == torch.int64
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), whole)


def test_batches_carry_on_over_the_end_of_an_epoch(tmp_path: Path) -> None:
    prefixes, _ = write(tmp_path, [36])
    dataset = TokenDataset(prefixes, 5, seed=1)
    assert dataset.num_windows == 7
    loader = Loader(dataset, 4)
    seen = torch.cat([loader.batch(step).tokens[:, 0] for step in range(7)]).tolist()
    firsts = [0, 5, 10, 15, 20, 25, 30]
    for epoch in range(4):
        assert sorted(seen[7 * epoch : 7 * epoch + 7]) == firsts
    assert len({tuple(seen[7 * e : 7 * e + 7]) for e in range(4)}) > 1


def test_a_step_does_not_depend_on_what_was_read_before(tmp_path: Path) -> None:
    prefixes, _ = write(tmp_path, [200])
    forward = [b.tokens for b in map(Loader(TokenDataset(prefixes, 7, 2), 3).batch, range(20))]
    backward = [b.tokens for b in map(Loader(TokenDataset(prefixes, 7, 2), 3).batch, reversed(range(20)))]
    assert all(torch.equal(a, b) for a, b in zip(forward, reversed(backward), strict=True))


def test_batches_can_be_written_to_without_touching_the_data(tmp_path: Path) -> None:
    prefixes, _ = write(tmp_path, [50])
    loader = Loader(TokenDataset(prefixes, 5, 2), 3)
    before: Batch = loader.batch(0)
    kept = before.tokens.clone()
    loader.batch(0).labels.fill_(-100)
    loader.batch(0).tokens.fill_(7)
    assert torch.equal(loader.batch(0).tokens, kept)


def test_a_short_file_among_longer_ones_gives_no_window(tmp_path: Path) -> None:
    prefixes, streams = write(tmp_path, [3, 12, 0, 6])
    dataset = TokenDataset(prefixes, 5, 0)
    assert dataset.sequential(np.arange(dataset.num_windows)).tolist() == [
        streams[1][0:6],
        streams[1][5:11],
        streams[3][0:6],
    ]


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    prefixes, _ = write(tmp_path, [20])
    with pytest.raises(
        ValueError, match=r"0\.bin has 20 tokens; seq_length 20 needs at least 21: lower data\.seq_length"
    ):
        TokenDataset(prefixes, 20, 0)
    assert TokenDataset(prefixes, 19, 0).num_windows == 1
    with pytest.raises(ValueError, match=r"set data\.train to at least one prefix"):
        TokenDataset([], 4, 0)
    with pytest.raises(ValueError, match=r"data\.seq_length = 0: must be at least 1"):
        TokenDataset(prefixes, 0, 0)
    with pytest.raises(ValueError, match=r'data\.order = "random": must be one of permuted, sequential'):
        TokenDataset(prefixes, 4, 0, order="random")
    with pytest.raises(FileNotFoundError, match=r"nope\.idx: no such token file"):
        TokenDataset([tmp_path / "nope"], 4, 0)
    dataset = TokenDataset(prefixes, 4, 0)
    for window in (-1, 4):
        with pytest.raises(IndexError, match=f"windows are 0 to 3; asked for {window}"):
            dataset.sequential(window)
    with pytest.raises(ValueError, match=r"train\.global_batch_size = 0"):
        Loader(dataset, 0)
    with pytest.raises(ValueError, match=r"train\.micro_batch_size = 0"):
        list(Loader(dataset, 2).microbatches(0, 0))
