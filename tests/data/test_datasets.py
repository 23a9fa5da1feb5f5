"""Datasets from a config: which order, pool, blend and split, what is refused, and what the fingerprint tells apart."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neox.config import Config, ConfigError, DataConfig, load_config
from neox.data import Loader, PermutedOrder, TokenDataset, build_datasets
from neox.data.blend import shares
from neox.data.megatron import MegatronDataset
from neox.data.split import Documents, bounds
from tests.corpus.corpora import documents, write_pair
from tests.data.test_blend import slow


def pairs(folder: Path, *sizes: list[int]) -> list[Path]:
    """Token files of these documents; file n starts at token 1000 n."""
    return [write_pair(folder / f"f{number}", own, 1000 * number) for number, own in enumerate(sizes)]


def config(files: list[Path], **values) -> DataConfig:
    return DataConfig(train=tuple(map(str, files)), seq_length=values.pop("seq_length", 4), **values)


def rows(dataset, count: int) -> list[list[int]]:
    return dataset.sample(np.arange(count)).tolist()


A, B, C = [9, 0, 7, 12, 1, 5], [3, 3, 20], [15, 15]


def test_permuted_pools_the_windows_of_all_files(tmp_path: Path) -> None:
    files = pairs(tmp_path, A, B)
    built = build_datasets(config(files), files, files[:1], seed=5, train_samples=10)
    assert rows(built.train, 40) == rows(TokenDataset(files, 4, 5), 40)
    assert rows(built.valid, 8) == rows(TokenDataset(files[:1], 4, 5, "sequential"), 8)
    assert build_datasets(config(files), files, [], 5, 10).valid is None


def test_permuted_with_weights_gives_each_file_a_permutation_of_its_own(tmp_path: Path) -> None:
    files = pairs(tmp_path, A, B, C)
    weights = (0.5, 0.2, 0.3)
    built = build_datasets(config(files, weights=weights), files, [], seed=2**63 - 1, train_samples=50)
    windows = [TokenDataset([file], 4, 0, "sequential") for file in files]
    orders = [PermutedOrder(w.num_windows, seed) for w, seed in zip(windows, (2**63 - 1, 0, 1), strict=True)]
    expected = []
    for owner, index in zip(*slow(list(weights), 100), strict=True):
        expected += windows[owner].sequential(orders[owner](np.array([index]))).tolist()
    assert rows(built.train, 100) == expected  # beyond train_samples too: this order has no end


def test_megatron_with_one_file_is_its_dataset(tmp_path: Path) -> None:
    files = pairs(tmp_path, A)
    built = build_datasets(config(files, order="megatron", num_samples=30), files, [], 7, 20)
    assert rows(built.train, 30) == rows(MegatronDataset(Documents(documents(tmp_path / "x", A).file), 4, 7, 30), 30)
    default = build_datasets(config(files, order="megatron"), files, [], 7, 30)
    assert rows(default.train, 30) == rows(built.train, 30)
    assert default.fingerprint == built.fingerprint


@pytest.mark.parametrize("weights", [(), (1.0, 1.0, 1.0), (0.7, 0.2, 0.1), (30.0, 10.0, 60.0)])
def test_megatron_with_several_files_blends_them(tmp_path: Path, weights: tuple[float, ...]) -> None:
    files = pairs(tmp_path, A, B, C)
    count = 40
    built = build_datasets(config(files, order="megatron", weights=weights), files, [], 7, count)
    given_weights = list(weights or (1.0, 1.0, 1.0))
    made_for = [int(np.ceil(count * (w / sum(given_weights)) * 1.005)) for w in given_weights]
    each = [
        MegatronDataset(Documents(TokenDataset([file], 1, 0).sources[0].file), 4, 7, samples)
        for file, samples in zip(files, made_for, strict=True)
    ]
    size = sum(len(dataset) for dataset in each)
    expected = [each[owner].sample(index)[0].tolist() for owner, index in zip(*slow(given_weights, size), strict=True)]
    assert rows(built.train, size + 10) == expected + expected[:10]  # gpt-neox's fallback: number % size


def test_one_weight_is_a_blend_of_one_which_asks_for_more(tmp_path: Path) -> None:
    """gpt-neox's train_data_paths with one path, as the Pythia models were trained: half a percent more samples."""
    files = pairs(tmp_path, A)
    built = build_datasets(config(files, order="megatron", weights=(3.0,)), files, [], 7, 1000)
    dataset = MegatronDataset(TokenDataset(files, 1, 0).sources[0], 4, 7, 1005)
    assert rows(built.train, 1000) == rows(dataset, 1000)
    plain = build_datasets(config(files, order="megatron"), files, [], 7, 1000)
    assert rows(built.train, 1000) != rows(plain.train, 1000)
    assert built.fingerprint != plain.fingerprint


@pytest.mark.parametrize("order", ["permuted", "megatron"])
@pytest.mark.parametrize("weights", [(), (0.5, 0.5)])
def test_split_gives_validation_documents_of_each_file(tmp_path: Path, order: str, weights: tuple[float, ...]) -> None:
    sizes = [[6] * 10, [8] * 15]
    files = pairs(tmp_path, *sizes)
    values = {"order": order, "weights": weights, "seq_length": 3}
    built = build_datasets(config(files, split="6,3,1", **values), files, [], 5, 40)
    training, held_out = [], []
    for number, own in enumerate(sizes):
        _, middle, stop, _ = bounds((0.6, 0.3, 0.1), len(own))
        part = tmp_path / f"p{number}"
        training.append(write_pair(part, own[:middle], 1000 * number))
        held_out.append(write_pair(tmp_path / f"v{number}", own[middle:stop], 1000 * number + sum(own[:middle])))
    alone = build_datasets(config(files, **values), training, held_out, 5, 40)
    assert rows(built.train, 40) == rows(alone.train, 40)
    assert built.valid.num_windows == alone.valid.num_windows
    assert rows(built.valid, 30) == rows(alone.valid, 30)
    read = {token for row in rows(built.train, 40) for token in row}
    assert not read & {token for row in rows(built.valid, 30) for token in row}


@settings(deadline=None, max_examples=15)
@given(
    batch=st.integers(1, 13), ranks=st.integers(1, 5), micro=st.integers(1, 5), weighted=st.booleans(), data=st.data()
)
def test_megatron_samples_of_a_step_on_any_number_of_ranks(
    tmp_path_factory: pytest.TempPathFactory, batch: int, ranks: int, micro: int, weighted: bool, data: st.DataObject
) -> None:
    """Step t reads samples t*B to (t+1)*B - 1, which is what Pythia's checkpoints are numbered by."""
    files = pairs(tmp_path_factory.mktemp("data"), A, B)
    steps = 6
    weights = (0.3, 0.7) if weighted else ()
    built = build_datasets(config(files, order="megatron", weights=weights), files, [], 3, steps * batch)
    everything = rows(built.train, steps * batch)
    step = data.draw(st.integers(0, steps - 1))
    loader = Loader(built.train, batch)
    read = []
    for rank in range(ranks):
        for part in loader.microbatches(step, micro, rank, ranks):
            for tokens, labels in zip(part.tokens.tolist(), part.labels.tolist(), strict=True):
                if max(labels) >= 0:
                    read.append([*tokens, labels[-1]])
    assert read == everything[step * batch : (step + 1) * batch]


def test_megatron_num_samples_too_small(tmp_path: Path) -> None:
    files = pairs(tmp_path, A, B)
    one = [*files[:1]]
    # A has 34 tokens: 33 // 4 = 8 samples in one epoch.
    assert build_datasets(config(one, order="megatron", num_samples=3), one, [], 1, 8)
    with pytest.raises(ValueError, match=r"data\.num_samples = 3 gives 8 samples; .* takes 9: raise data\.num_samples"):
        build_datasets(config(one, order="megatron", num_samples=3), one, [], 1, 9)
    for weights in ((), (0.1, 0.9)):
        with pytest.raises(ValueError, match=r"data\.num_samples = 3 gives \d+ samples; .* or lower train\.steps"):
            build_datasets(config(files, order="megatron", num_samples=3, weights=weights), files, [], 1, 99)
    assert build_datasets(config(one, num_samples=3), one, [], 1, 99)  # permuted does not depend on it
    for count in range(1, 12):  # its own number of samples is always enough, down to blends shorter than that
        assert build_datasets(config(files, order="megatron"), files, [], 1, count).train.sample(count - 1).shape


def test_too_few_tokens(tmp_path: Path) -> None:
    files = pairs(tmp_path, A, [2, 1], [1])
    with pytest.raises(ValueError, match=r"f1\.bin has 3 tokens; seq_length 4 needs at least 5"):
        build_datasets(config(files, weights=(1.0, 1.0, 1.0)), files, [], 1, 9)
    with pytest.raises(ValueError, match=r"f2\.bin has 1 tokens; a sample needs at least 2: add text"):
        build_datasets(config(files, order="megatron"), files, [], 1, 9)
    with pytest.raises(ValueError, match=r"f1\.bin, documents 1 to 1, has 1 tokens; seq_length 4 needs at least 5"):
        build_datasets(config(files[1:2], order="megatron", split="1,1"), files[1:2], [], 1, 9)
    for order in ("permuted", "megatron"):
        with pytest.raises(ValueError, match=r"set data\.train to at least one prefix"):
            build_datasets(DataConfig(order=order), [], [], 1, 9)


def test_options_that_do_not_fit() -> None:
    cases = [
        ("weights=[1.0]", "data.weights: 1 for 2 entries of data.train; give one each (from weights=[1.0])"),
        ("weights=[1.0, 0.0]", "data.weights[1]: must be greater than 0, got 0.0"),
        ("weights=[1, -2]", "data.weights[1]: must be greater than 0, got -2"),
        ("split=9/0.5", "data.split: holds out a part of data.train; leave out one of data.split and data.valid"),
        ("split=x", 'data.split: "x" must be up to three shares'),
        ("num_samples=0", "data.num_samples: must be greater than 0"),
        ("order=random", "data.order: must be 'permuted', 'megatron' or 'preshuffled', got 'random'"),
    ]
    for override, message in cases:
        with pytest.raises(ConfigError) as caught:
            load_config(overrides=['data.train=["a", "b"]', "data.valid=c", override])
        assert message in str(caught.value), override


def test_options_survive_the_file_of_a_run(tmp_path: Path) -> None:
    text = ["order=megatron", "num_samples=77", "split=995,4,1", "weights=[0.7, 3]", "segments=true"]
    made = load_config(overrides=['data.train=["a", "b"]', *text])
    assert (made.data.split, made.data.weights, made.data.num_samples) == ("995,4,1", (0.7, 3.0), 77)
    (tmp_path / "config.toml").write_text(made.to_toml())
    assert load_config(files=[tmp_path / "config.toml"]) == made
    assert (
        load_config(files=[tmp_path / "config.toml"], overrides=["split=none", "num_samples=none"]).data.split is None
    )
    assert Config().data.num_samples is None


def test_order_fingerprint_is_that_of_the_order(tmp_path: Path) -> None:
    files = pairs(tmp_path, A, B)

    def fingerprint(names=files, seed=1, samples=20, **values) -> str:
        return build_datasets(config(names, **values), names, [], seed, samples).fingerprint

    first = fingerprint()
    assert len(first) == 16
    (tmp_path / "moved").mkdir()
    same = [
        fingerprint(pairs(tmp_path / "moved", A, B)),
        fingerprint(samples=99),  # more steps: permuted goes on in the same order
        fingerprint(num_samples=7),
        fingerprint(segments=True),  # the same samples, looked at in another way
    ]
    assert set(same) == {first}
    megatron = {"order": "megatron"}
    other = [
        first,
        fingerprint(seed=2),
        fingerprint(seq_length=5),
        fingerprint(names=files[::-1]),
        fingerprint(names=files[:1]),
        fingerprint(weights=(1.0, 1.0)),
        fingerprint(weights=(1.0, 2.0)),
        fingerprint(split="1,1"),
        fingerprint(split="2,1"),
        fingerprint(**megatron),
        fingerprint(**megatron, num_samples=21),
        fingerprint(**megatron, seed=2),
    ]
    assert len(set(other)) == len(other)
    assert fingerprint(**megatron, num_samples=20, samples=7) == fingerprint(**megatron)
    (tmp_path / "f0.json").write_text(json.dumps({"tokenizer_sha256": "x"}))
    assert fingerprint() != first
    (tmp_path / "f0.json").write_text("no manifest")
    assert fingerprint() == first


def test_data_order_guide_example_prints_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "data_order.md").read_text(encoding="utf-8")
    code = guide.partition("```python\n")[2].partition("```")[0]
    printed = guide.partition("```text\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "data_order.md", "exec"), {})
    assert capsys.readouterr().out == printed
    data = DataConfig(train=("letters",), seq_length=4, order="megatron")
    dataset = build_datasets(data, [Path("letters")], [], seed=2, train_samples=6).train
    assert (dataset.epochs, len(dataset), "".join(map(chr, dataset.sample(6)[0]))) == (2, 6, "ijklm")


def test_data_order_guide_recipe_is_pythias(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "data_order.md").read_text(encoding="utf-8")
    (tmp_path / "run.toml").write_text(guide.partition("```toml\n")[2].partition("```")[0])
    made = load_config("pythia-160m", [tmp_path / "run.toml"])
    assert made.data.num_samples == 143000 * made.train.global_batch_size
    assert shares(made.data.weights, made.data.num_samples) == [147164160]
