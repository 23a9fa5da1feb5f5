"""Where the shares of a blend come from, what is known of a document's source, arrays that are kept on the disk."""

import threading
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neox.config import ConfigError, DataConfig
from neox.config.pile import COMPONENTS
from neox.data import TokenFile, build_datasets, megatron
from neox.data.arrays import cached_arrays, content_key
from neox.data.datasets import whole
from neox.data.provenance import Origin, Provenance
from neox.data.weights import blend_weights, by_documents
from tests.corpus.corpora import note, write_pair


@settings(deadline=None)
@given(counts=st.lists(st.integers(1, 10**9), min_size=2, max_size=9), alpha=st.integers(0, 2))
def test_blend_weights_by_numbers_of_documents(counts: list[int], alpha: int) -> None:
    """The description in exact fractions."""
    total = sum(counts)
    powers = [Fraction(count, total) ** alpha for count in counts]
    wanted = [power / sum(powers) * (1 - Fraction(count, total)) for power, count in zip(powers, counts, strict=True)]
    wanted = [float(weight / sum(wanted)) for weight in wanted]
    assert by_documents(counts, float(alpha)) == pytest.approx(wanted, rel=1e-6)


def test_blend_weights_alpha_favours_small_corpora() -> None:
    assert by_documents([7], 0.3) == (1.0,)
    # By hand: shares .9 and .1; to the 0.5 they are in the ratio 3 to 1, times (.1, .9): 3 to 9.
    assert by_documents([900, 100], 0.5) == pytest.approx((0.25, 0.75))
    assert by_documents([900, 100], 2.0) == pytest.approx((0.9, 0.1))


def test_blend_weights_of_the_pile(tmp_path: Path) -> None:
    files = [write_pair(tmp_path / name, [20, 20], 1000 * n) for n, name in enumerate("abc")]
    names = ["ArXiv", "Enron Emails", "Pile-CC"]
    for file, name in zip(files, names, strict=True):
        note(file, ("x.jsonl", name, 1), ("y.jsonl", name, 1))
    config = DataConfig(train=tuple(map(str, files)), seq_length=4, weigh="pile")
    assert blend_weights(config, whole(files)) == tuple(COMPONENTS[name].weight for name in names)
    built = build_datasets(config, files, [], 3, 2000)
    numbers = config.model_copy(update={"weigh": "given", "weights": built.weights})
    assert build_datasets(numbers, files, [], 3, 2000).fingerprint == built.fingerprint
    counts = np.bincount(built.train.owners(np.arange(2000)))
    total = sum(built.weights)
    assert (np.abs(counts - [2000 * weight / total for weight in built.weights]) < 2).all()
    note(files[0], ("x.jsonl", "ArXiv", 1), ("y.jsonl", "Github", 1))
    with pytest.raises(ValueError, match=r'a\.bin: data\.weigh = "pile" needs .* this holds ArXiv, Github: prepare'):
        build_datasets(config, files, [], 3, 10)
    files[0].with_suffix(".components.json").unlink()
    with pytest.raises(ValueError, match=r"this holds None: prepare the components apart"):
        build_datasets(config, files, [], 3, 10)


def test_blend_weights_from_two_places_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.weigh: pile and data\.weights both give the shares"):
        DataConfig(weights=(1.0,), weigh="pile")
    with pytest.raises(ConfigError, match=r"data\.order: preshuffled samples are read as they stand"):
        DataConfig(weights=(1.0,), order="preshuffled")


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(["Books3", "ArXiv", "Github"]), st.integers(1, 4)),
        min_size=1,
    ),
    known=st.booleans(),
    sizes=st.randoms(use_true_random=False),
    first=st.integers(0, 5),
)
def test_provenance_is_read_back(tmp_path_factory: pytest.TempPathFactory, rows, known, sizes, first) -> None:
    """Against one tuple a document."""
    rows = [(source, component if known else None, count) for source, component, count in rows]
    every = [(source, component) for source, component, count in rows for _ in range(count)]
    lengths = [sizes.randint(0, 9) for _ in every]
    prefix = write_pair(tmp_path_factory.mktemp("data") / "x", lengths)
    note(prefix, *rows)
    file = TokenFile(prefix)
    sources = Provenance.of(file)
    assert [tuple(sources[n]) for n in range(len(every))] == every
    first = min(first, len(every) - 1)
    wanted: dict[str | None, int] = {}
    for (_, component), size in list(zip(every, lengths, strict=True))[first:]:
        wanted[component] = wanted.get(component, 0) + size
    assert sources.tokens(file.sizes[first:], first) == wanted
    assert set(sources.components(first, len(every) - first)) == set(wanted)


def test_provenance_files_that_do_not_fit(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "x", [3] * 6)
    assert Provenance.of(TokenFile(prefix))[5] == Origin(None, None)
    for name, broken in (
        ("x.json", b'{"origins": [["a", 5]]}'),
        ("x.json", b'{"origins": [3]}'),
        ("x.json", b"{"),
        ("x.json", b"[]"),
        ("x.components.json", b'{"counts": []}'),
        ("x.components.npy", b"\x93NUMPY"),
    ):
        note(prefix, ("a", "ArXiv", 6))
        assert Provenance.of(TokenFile(prefix))[5] == Origin("a", "ArXiv")
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(ValueError, match=rf"{name}: does not fit .*x\.bin .*: remove it, or prepare again"):
            Provenance.of(TokenFile(prefix))
    np.save(tmp_path / "x.components.npy", np.zeros(5, np.uint16))
    with pytest.raises(ValueError, match=r"x\.components\.npy: does not fit .* tells of \(5,\) documents, there are 6"):
        Provenance.of(TokenFile(prefix))


def test_megatron_order_cache_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [write_pair(tmp_path / "a", [9, 3, 0, 14]), write_pair(tmp_path / "b", [5, 5, 6], 1000)]
    config = DataConfig(train=tuple(map(str, files)), seq_length=3, order="megatron", weights=(1.0, 2.0))
    plain = build_datasets(config, files, [], 5, 40)
    monkeypatch.setattr(megatron, "SMALL", 0)
    kept = tmp_path / "order"
    for _ in range(2):
        built = build_datasets(config, files, [], 5, 40, cache=kept)
        assert built.fingerprint == plain.fingerprint
        assert built.train.sample(range(60)).tolist() == plain.train.sample(range(60)).tolist()
        assert all(isinstance(own.doc_idx, np.memmap) for own in built.train.datasets)
        found = sorted(kept.iterdir())
        assert len(found) == 6  # three a file, and nothing temporary
        monkeypatch.setattr(np.random, "RandomState", None)  # the second time nothing is shuffled
    monkeypatch.undo()
    monkeypatch.setattr(megatron, "SMALL", 0)
    build_datasets(config, files, [], 6, 40, cache=kept)
    write_pair(tmp_path / "b", [5, 6, 5], 1000)  # as many documents and tokens, but others
    build_datasets(config, files, [], 5, 40, cache=kept)
    assert len(list(kept.iterdir())) == 6 + 6 + 3
    found[0].write_bytes(found[0].read_bytes()[:70])
    write_pair(tmp_path / "b", [5, 5, 6], 1000)
    with pytest.raises(ValueError, match=r"order/[0-9a-f]{24}_\*\.npy: damaged .*: remove them"):
        build_datasets(config, files, [], 5, 40, cache=kept)


def test_order_cache_written_by_many_at_once_is_whole(tmp_path: Path) -> None:
    wanted = np.arange(100_000)
    wrong = []

    def work() -> None:
        for _ in range(5):
            found = cached_arrays(tmp_path, "k", ("a",), lambda: {"a": wanted})["a"]
            if not np.array_equal(found, wanted):
                wrong.append(found)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert [path.name for path in tmp_path.iterdir()] == ["k_a.npy"]
    assert content_key({"a": 1}, wanted) == content_key({"a": 1}, wanted.copy())
    assert content_key({"a": 1}, wanted) != content_key({"a": 1}, wanted[::-1])


def test_order_cache_that_cannot_be_written_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "order").write_text("a file")
    with pytest.raises(OSError, match=r"order"):
        cached_arrays(tmp_path / "order", "k", ("a",), lambda: {"a": np.arange(3)})
