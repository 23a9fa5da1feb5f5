"""Exported index files: read as gpt-neox reads them they give the samples of the run; long indices open quickly."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import neox.data.token_file as mmap
from neox.config import DataConfig
from neox.data import TokenFile, build_datasets
from neox.data.order_files import export_order
from tests.corpus.corpora import sizes_of_documents, texts, write_pair
from tests.data.test_blend import slow


def as_gpt_neox_reads(stem: str, documents: list[list[int]], sample: int) -> list[int]:
    """One sample, document by document, from the description of the three files."""
    doc, begins, shuffle = (np.load(f"{stem}_{kind}_idx.npy") for kind in ("doc", "sample", "shuffle"))
    assert doc.dtype == np.int32
    assert begins.dtype == np.int32
    number = shuffle[sample]
    (first, offset), (last, last_offset) = begins[number].tolist(), begins[number + 1].tolist()
    if first == last:
        return documents[doc[first]][offset : last_offset + 1]
    between = [token for place in range(first + 1, last) for token in documents[doc[place]]]
    return documents[doc[first]][offset:] + between + documents[doc[last]][: last_offset + 1]


@settings(deadline=None, max_examples=40)
@given(
    sizes=sizes_of_documents,
    order=st.sampled_from(["permuted", "megatron"]),
    seq_length=st.integers(1, 9),
    samples=st.integers(1, 40),
)
def test_index_files_of_one_file(tmp_path_factory: pytest.TempPathFactory, sizes, order, seq_length, samples) -> None:
    assume(sum(sizes) > seq_length)
    folder = tmp_path_factory.mktemp("data")
    file = write_pair(folder / "x", sizes)
    config = DataConfig(train=(str(file),), seq_length=seq_length, order=order)
    dataset = build_datasets(config, [file], [], 7, samples).train
    paths = export_order(dataset, samples, 7, folder / "out" / "pile")
    stem = f"pile_train_indexmap_{samples}ns_{seq_length}sl_7s_packedpi_ac"
    assert [path.name for path in paths] == [f"{stem}_{kind}_idx.npy" for kind in ("doc", "sample", "shuffle")]
    documents = texts(sizes)
    found = [as_gpt_neox_reads(str(folder / "out" / stem), documents, sample) for sample in range(samples)]
    assert found == dataset.sample(range(samples)).tolist()


@pytest.mark.parametrize("order", ["permuted", "megatron"])
def test_index_files_of_each_source_of_a_blend(tmp_path: Path, order: str) -> None:
    sizes = [[9, 0, 7, 12], [3, 3, 20]]
    files = [write_pair(tmp_path / f"f{n}", own, 1000 * n) for n, own in enumerate(sizes)]
    config = DataConfig(train=tuple(map(str, files)), seq_length=4, order=order, weights=(1.0, 2.0))
    dataset = build_datasets(config, files, [], 7, 30).train
    export_order(dataset, 30, 7, tmp_path / "o")
    made_for = [11, 21] if order == "megatron" else [10, 20]  # ceil(30 / 3 * 1.005), or what is taken
    stems = [tmp_path / f"o_train_{n}_indexmap_{made_for[n]}ns_4sl_7s_packedpi_ac" for n in range(2)]
    documents = [texts(own, 1000 * n) for n, own in enumerate(sizes)]
    if order == "permuted":  # the parts' seeds follow each other
        assert {path.name for path in tmp_path.glob("o_*")} == {
            f"{stem.name}_{kind}_idx.npy" for stem in stems for kind in ("doc", "sample", "shuffle")
        }
    found = [
        as_gpt_neox_reads(str(stems[owner]), documents[owner], index)
        for owner, index in zip(*slow([1.0, 2.0], 30), strict=True)
    ]
    assert found == dataset.sample(range(30)).tolist()


def test_index_files_by_their_old_names(tmp_path: Path) -> None:
    """The same bytes, under the names of gpt-neox 1.0."""
    file = write_pair(tmp_path / "x", [9, 12])
    dataset = build_datasets(DataConfig(train=(str(file),), seq_length=4), [file], [], 7, 10).train
    today, old = (export_order(dataset, 10, 7, tmp_path / "o", names) for names in ("today", "v1"))
    assert [path.name for path in old] == [
        f"o_train_indexmap_10ns_4sl_7s_{k}_idx.npy" for k in ("doc", "sample", "shuffle")
    ]
    assert [path.read_bytes() for path in old] == [path.read_bytes() for path in today]


def test_megatron_order_at_the_exact_border(tmp_path: Path) -> None:
    """21 tokens are exactly 5 samples of 4: gpt-neox's dataset counts 4, its shuffle_idx holds the fifth."""
    file = write_pair(tmp_path / "x", [9, 12])
    config = DataConfig(train=(str(file),), seq_length=4, order="megatron")
    dataset = build_datasets(config, [file], [], 7, 5).train
    assert dataset.epochs == 1
    assert len(dataset) == 4
    export_order(dataset, 5, 7, tmp_path / "o")
    stem = str(tmp_path / "o_train_indexmap_5ns_4sl_7s_packedpi_ac")
    found = [as_gpt_neox_reads(stem, texts([9, 12]), sample) for sample in range(5)]
    assert found == dataset.sample(range(5)).tolist()


def test_index_files_refused_for_pooled_and_preshuffled(tmp_path: Path) -> None:
    files = [write_pair(tmp_path / f"f{n}", [5, 5]) for n in range(2)]
    for count, order in ((2, "permuted"), (1, "preshuffled")):
        config = DataConfig(train=tuple(map(str, files[:count])), seq_length=4, order=order)
        dataset = build_datasets(config, files[:count], [], 1, 5).train
        with pytest.raises(ValueError, match="export: gpt-neox's index files hold the order of one file each"):
            export_order(dataset, 5, 1, tmp_path / "o")
    assert not list(tmp_path.glob("o*"))


def index(path: Path, sizes: np.ndarray, pointers: np.ndarray) -> Path:
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, len(sizes), 0)
    path.with_suffix(".idx").write_bytes(header + sizes.astype("<i4").tobytes() + pointers.astype("<i8").tobytes())
    np.zeros(int(sizes.sum()), "<u2").tofile(path.with_suffix(".bin"))
    return path


@pytest.mark.parametrize("count", [1, 7, 63, 64, 65, 200])
def test_long_idx_is_checked_in_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Up to CHECKED documents each displaced one is found; beyond, those of the first and last stretches."""
    monkeypatch.setattr(mmap, "CHECKED", 64)
    monkeypatch.setattr(mmap, "STRETCHES", 8)
    sizes = np.random.default_rng(count).integers(1, 9, count)
    pointers = 2 * (np.cumsum(sizes) - sizes)
    assert len(TokenFile(index(tmp_path / "x", sizes, pointers)).tokens) == sizes.sum()
    for document in range(count) if count <= 64 else [0, 3, 7, count - 3, count - 1]:
        moved = pointers.copy()
        moved[document] += 2
        with pytest.raises(ValueError, match=r"x\.(idx|bin): damaged or incomplete: (document \d+|expected)"):
            TokenFile(index(tmp_path / "x", sizes, moved))
