"""gpt-neox's order: against its description in plain Python, against digests of what its own code gives, by counts."""

import hashlib
import struct
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from neox.data import TokenFile, megatron
from neox.data.megatron import MegatronDataset
from neox.data.split import Documents
from tests.corpus.corpora import documents, sizes_of_documents, texts


class Slow:
    """The description of gpt-neox's packed dataset, one document and one token at a time."""

    def __init__(self, sizes: list[int], first: int, last: int, seq_length: int, seed: int, num_samples: int) -> None:
        self.texts, self.seq_length = texts(sizes), seq_length
        tokens_per_epoch = sum(sizes[first:last])
        epochs = 1
        while (epochs * tokens_per_epoch - 1) // seq_length < num_samples:
            epochs += 1
        count = (epochs * tokens_per_epoch - 1) // seq_length
        rng = np.random.RandomState(seed)
        shuffled = np.array([doc for _ in range(epochs) for doc in range(first, last)], dtype=np.int32)
        rng.shuffle(shuffled)
        self.doc_idx = shuffled.tolist()
        self.sample_idx = [(0, 0)]
        place = offset = 0
        for _ in range(count):
            left = seq_length + 1
            while left:
                available = sizes[self.doc_idx[place]] - offset
                if available >= left:  # the sample ends here; the next begins on its last token
                    offset, left = offset + left - 1, 0
                else:
                    left -= available
                    place, offset = place + 1, 0
            self.sample_idx.append((place, offset))
        shuffled = np.arange(count, dtype=np.uint32)
        rng.shuffle(shuffled)
        self.shuffle_idx = shuffled.tolist()

    def __len__(self) -> int:
        return min(len(self.shuffle_idx) - 1, len(self.sample_idx) - 1)

    def __getitem__(self, sample: int) -> list[int]:
        try:
            number = self.shuffle_idx[sample]
        except IndexError:
            return self[sample % len(self)]
        (place, offset), (last_place, last_offset) = self.sample_idx[number : number + 2]
        if place == last_place:
            return self.texts[self.doc_idx[place]][offset : last_offset + 1]
        tokens = self.texts[self.doc_idx[place]][offset:]
        for between in range(place + 1, last_place):
            tokens = tokens + self.texts[self.doc_idx[between]]
        return tokens + self.texts[self.doc_idx[last_place]][: last_offset + 1]


@settings(deadline=None, max_examples=100)
@given(
    sizes=sizes_of_documents,
    cut=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    seq_length=st.integers(1, 12),
    seed=st.integers(0, 2**32 - 1),
    num_samples=st.integers(1, 60),
    group=st.sampled_from([1, 3, 64]),
    far=st.integers(0, 500),
)
def test_megatron_order_equals_the_description(
    tmp_path_factory: pytest.TempPathFactory, sizes, cut, seq_length, seed, num_samples, group, far
) -> None:
    first, last = cut[0], len(sizes) - cut[1]
    assume(first < last and sum(sizes[first:last]) >= 2)
    expected = Slow(sizes, first, last, seq_length, seed, num_samples)
    part = documents(tmp_path_factory.mktemp("data") / "x", sizes, first, last)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron, "GROUP", group)
        patch.setattr(megatron, "BLOCK", 5 * group)
        dataset = MegatronDataset(part, seq_length, seed, num_samples)
        assert dataset.doc_idx.dtype == np.int32
        assert dataset.doc_idx.tolist() == expected.doc_idx
        assert dataset.shuffle_idx.dtype == np.uint32
        assert dataset.shuffle_idx.tolist() == expected.shuffle_idx
        count = len(expected.shuffle_idx)
        assert dataset.sample_idx(np.arange(count + 1)).tolist() == [list(pair) for pair in expected.sample_idx]
        assert np.concatenate([*dataset.whole_sample_idx()]).tolist() == [list(pair) for pair in expected.sample_idx]
        assert len(dataset) == len(expected) == count - 1
        assert count >= num_samples
        samples = [*range(count), *((count + far,) if count > 1 else ())]
        rows = dataset.sample(samples)
        assert rows.dtype == np.int64
        assert rows.tolist() == [expected[s] for s in samples]
        # Every token is another number: where a document ends is where the tokens are another document's.
        owner = {token: number for number, text in enumerate(expected.texts) for token in text}
        for row, numbers in zip(rows.tolist(), dataset.documents(samples).tolist(), strict=True):
            # A document of one epoch may be followed by itself in the next: then only its first token tells.
            begins = [after != before + 1 or owner[after] != owner[before] for before, after in pairwise(row)]
            assert numbers == np.cumsum([False, *begins]).tolist()


@pytest.mark.parametrize(
    ("seed", "num_samples", "seq_length", "digest"),
    [(1234, 100, 8, "5edbfb9884d252d3"), (1234, 16, 8, "a440577e204a8a32"), (7, 1000, 3, "eea20d86856cf9f3")],
)
def test_megatron_order_equals_gpt_neox_code(tmp_path: Path, seed, num_samples, seq_length, digest) -> None:
    """The digests are of the three arrays that gpt-neox's own functions, its C++ helper included, gave."""
    part = documents(tmp_path / "x", [i * i % 11 for i in range(50)])
    dataset = MegatronDataset(part, seq_length, seed, num_samples)
    arrays = dataset.doc_idx, dataset.sample_idx(np.arange(len(dataset.shuffle_idx) + 1)), dataset.shuffle_idx
    hashed = hashlib.sha256(b"".join(np.ascontiguousarray(array).astype("<i8").tobytes() for array in arrays))
    assert hashed.hexdigest()[:16] == digest


def test_megatron_every_token_is_a_label_once(tmp_path: Path) -> None:
    dataset = MegatronDataset(documents(tmp_path / "x", [7, 0, 30, 1, 12]), 7, 3, 1)
    assert (dataset.epochs, len(dataset.shuffle_idx)) == (1, 7)  # 49 labels of 50 tokens, 7 a sample
    labels = dataset.sample(range(7))[:, 1:].flatten().tolist()
    assert len(set(labels)) == 49


def raw_pair(prefix: Path, sizes: np.ndarray) -> Path:
    """A pair in the documented layout, without a loop over documents."""
    pointers = (np.cumsum(sizes, dtype=np.int64) - sizes) * 2
    with prefix.with_suffix(".idx").open("wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, len(sizes), 0))
        file.write(sizes.astype("<i4").tobytes() + pointers.astype("<i8").tobytes())
    np.zeros(sizes.sum(), "<u2").tofile(prefix.with_suffix(".bin"))
    return prefix


def test_megatron_memory_is_four_bytes_a_document_and_epoch_and_four_a_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, epochs = 400_000, 3
    sizes = np.random.default_rng(0).integers(0, 9, count)
    part = Documents(TokenFile(raw_pair(tmp_path / "x", sizes)))
    tokens = int(sizes.sum())
    num_samples = (epochs * tokens - 1) // 8
    monkeypatch.setattr(megatron, "BLOCK", 64 << 6)
    tracemalloc.start()
    dataset = MegatronDataset(part, 8, 1, num_samples)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    arrays = 4 * epochs * count + 4 * num_samples
    assert dataset.doc_idx.nbytes + dataset.shuffle_idx.nbytes == arrays
    slack = 1 << 18
    assert kept <= arrays + 8 * epochs * count // 64 + slack
    assert peak <= kept + 8 * epochs * count // 64 + 4 * count + slack  # one epoch's documents before they are repeated
    tracemalloc.start()
    dataset.documents(range(64))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20  # neither sizes nor pointers are loaded whole
    tracemalloc.stop()


def test_megatron_reports_a_long_shuffle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    part = documents(tmp_path / "x", [7, 5])
    MegatronDataset(part, 4, 1, 5, progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(megatron, "SHOWN", 3)
    MegatronDataset(part, 4, 1, 5)
    assert capsys.readouterr().err == ""
    MegatronDataset(part, 4, 1, 5, progress=True)
    assert "x.bin: shuffling 4 documents and 5 samples" in capsys.readouterr().err


def test_megatron_refuses_what_it_cannot_order(tmp_path: Path) -> None:
    part = documents(tmp_path / "x", [0, 1, 9])
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=rf'train\.seed = {seed}: data\.order = "megatron" takes 0 to 2\*\*32 - 1'):
            MegatronDataset(part, 4, seed, 5)
    with pytest.raises(ValueError, match=r"data\.seq_length = 0"):
        MegatronDataset(part, 0, 1, 5)
    with pytest.raises(ValueError, match=r"x\.bin, documents 0 to 1, has 1 tokens; a sample needs at least 2: add"):
        MegatronDataset(Documents(part.file, 0, 2), 4, 1, 5)
    with pytest.raises(
        ValueError, match=r"has 10 tokens; 10{11} samples of 4 would repeat its 3 documents .* add text"
    ):
        MegatronDataset(part, 4, 1, 10**11)
