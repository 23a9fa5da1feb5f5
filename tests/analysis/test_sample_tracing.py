"""From samples to documents and back: against every token followed through every sample, in each order."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from neox.config import DataConfig
from neox.data import Loader, PermutedOrder, build_datasets
from neox.data.blend import BlendedDataset, BlendSchedule
from neox.data.windows import DocumentSpan
from tests.corpus.corpora import sizes_of_documents, write_pair
from tests.data.test_blend import slow

CASES = {
    "permuted": {},
    "megatron": {"order": "megatron"},
    "blended": {"weights": (0.3, 0.7)},
    "megatron blended": {"order": "megatron", "weights": (3.0, 1.0)},
}


def owners_of_tokens(sizes: list[list[int]]) -> dict[int, tuple[int, int, int]]:
    """For every token (each is another number): file, document, offset."""
    return {
        1000 * file + sum(own[:number]) + at: (file, number, at)
        for file, own in enumerate(sizes)
        for number, size in enumerate(own)
        for at in range(size)
    }


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.tuples(sizes_of_documents, sizes_of_documents),
    case=st.sampled_from(list(CASES)),
    seq_length=st.integers(1, 9),
    seed=st.integers(0, 99),
    samples=st.integers(1, 60),
    changed=st.none() | st.integers(0, 30),
    data=st.data(),
)
def test_trace_and_seen_follow_every_token(
    tmp_path_factory: pytest.TempPathFactory, sizes, case, seq_length, seed, samples, changed, data
) -> None:
    assume(all(sum(own) > seq_length + 1 for own in sizes))
    folder = tmp_path_factory.mktemp("data")
    files = [write_pair(folder / f"f{n}", own, 1000 * n) for n, own in enumerate(sizes)]
    config = DataConfig(train=tuple(map(str, files)), seq_length=seq_length, **CASES[case])
    dataset = build_datasets(config, files, [], seed, 30).train
    if changed is not None and isinstance(dataset, BlendedDataset):
        dataset = dataset.with_phases([*dataset.schedule.phases, (changed, (0.9, 0.1))])
    owners = owners_of_tokens(sizes)
    rows = dataset.sample(np.arange(samples)).tolist()
    # A document of megatron's stream may follow itself: only where the offset jumps back does another span begin.
    for row, spans, owner in zip(rows, dataset.trace(range(samples)), dataset.owners(np.arange(samples)), strict=True):
        followed = [(p.source, p.document, p.offset + at) for p in spans for at in range(p.tokens)]
        assert followed == [owners[token] for token in row]
        assert {p.source for p in spans} == {owner} or not isinstance(dataset, BlendedDataset)
        assert spans[0].source == owner
    part = data.draw(st.integers(0, 1))
    document = data.draw(st.integers(0, len(sizes[part]) - 1))
    offset = data.draw(st.integers(0, sizes[part][document]))
    span = DocumentSpan(part, document, offset, data.draw(st.integers(0, sizes[part][document] - offset)))
    wanted = {(part, document, offset + at) for at in range(span.tokens)}
    holding = [n for n, row in enumerate(rows) if wanted & {owners[token] for token in row}]
    seen = dataset.seen(span, samples)
    assert seen.shape[1:] == (2,)
    assert sorted(set(seen[:, 0].tolist())) == holding
    times = seen[:, 1].tolist()
    if case == "permuted":
        assert seen[:, 0].tolist() == holding  # each once
        assert times == [n // dataset.num_windows for n in holding]
    assert sorted(set(times)) == list(range(len(set(times)))) or case != "megatron"


@settings(deadline=None, max_examples=40)
@given(windows=st.integers(1, 300), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 9))
def test_inverse_of_the_permuted_order(windows: int, seed: int, epoch: int) -> None:
    order = PermutedOrder(windows, seed)
    samples = epoch * windows + np.arange(windows)
    assert order.inverse(order(samples), epoch).tolist() == samples.tolist()


def test_inverse_of_the_permuted_order_at_the_size_of_the_pile() -> None:
    order = PermutedOrder(146_484_375, 1234)  # 300 billion tokens in windows of 2048
    samples = 3 * order.num_windows + np.random.default_rng(0).integers(0, order.num_windows, 1000)
    assert order.inverse(order(samples), 3).tolist() == samples.tolist()


@settings(deadline=None, max_examples=40)
@given(
    changes=st.lists(st.integers(0, 90), max_size=3).map(sorted),
    weights=st.lists(st.tuples(*[st.floats(0.05, 5)] * 3), min_size=4, max_size=4),
    data=st.data(),
)
def test_blend_weights_that_change(changes, weights, data) -> None:
    """Each phase follows the greedy rule from nothing, and every dataset goes on where it stood."""
    starts, count = [0, *changes], 120
    given_so_far, owners, indices = [0, 0, 0], [], []
    for own, first, last in zip(weights, starts, [*changes, count], strict=False):
        for owner in slow(list(own), last - first)[0]:
            owners.append(owner)
            indices.append(given_so_far[owner])
            given_so_far[owner] += 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("neox.data.blend.SEGMENT", 16)
        schedule = BlendSchedule(list(zip(starts, weights, strict=False)))
        found = schedule(np.arange(count))
        assert (found[0].tolist(), found[1].tolist()) == (owners, indices)
        samples = data.draw(st.integers(0, count))
        assert schedule.given(samples).tolist() == [owners[:samples].count(d) for d in range(3)]
        for dataset in range(3):
            mine = np.array([n for n, owner in enumerate(owners) if owner == dataset], np.int64)
            assert schedule.numbers(dataset, np.arange(len(mine))).tolist() == mine.tolist()


@settings(deadline=None)
@given(
    batch=st.integers(1, 7),
    ranges=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=4),
)
def test_loader_finds_the_step_that_reads_a_sample(batch, ranges) -> None:
    loader = Loader(None, batch, [(first, first + size) for first, size in ranges])
    where = {int(n): [step, row] for step in range(100) for row, n in enumerate(loader.samples(step))}
    numbers = np.arange(100)
    for number, (step, row) in zip(numbers.tolist(), loader.steps(numbers).tolist(), strict=True):
        assert [step, row] == where[number] if step >= 0 else number not in where


def test_preshuffled_documents_are_the_samples(tmp_path: Path) -> None:
    """Pythia's published data: each document is a row of seq_length + 1 tokens, and none is shared."""
    file = write_pair(tmp_path / "rows", [5] * 6)
    config = DataConfig(train=(str(file),), seq_length=4, order="preshuffled")
    dataset = build_datasets(config, [file], [], 1, 6).train
    assert dataset.sample(range(8)).tolist() == [list(range(5 * n, 5 * n + 5)) for n in (0, 1, 2, 3, 4, 5, 0, 1)]
    assert dataset.trace([3]) == [[DocumentSpan(0, 3, 0, 5)]]
    assert dataset.seen(DocumentSpan(0, 3, 2, 1), 12).tolist() == [[3, 0], [9, 1]]
    batch = Loader(dataset, 2).batch(1)
    assert batch.tokens.tolist() == [[10, 11, 12, 13], [15, 16, 17, 18]]
    assert batch.labels.tolist() == [[11, 12, 13, 14], [16, 17, 18, 19]]
    other = write_pair(tmp_path / "other", [5, 4])
    with pytest.raises(ValueError, match=r"other\.bin: document 1 has 4 tokens; .* documents of .* = 5: set data\.seq"):
        build_datasets(config, [other], [], 1, 6)


@pytest.mark.parametrize("case", ["blended", "megatron blended"])
@pytest.mark.parametrize("ranks", [1, 3, 5])
def test_changed_blend_weights_on_any_number_of_ranks(tmp_path: Path, case: str, ranks: int) -> None:
    sizes = [[9, 0, 7, 12, 30], [3, 3, 20, 8]]
    files = [write_pair(tmp_path / f"f{n}", own, 1000 * n) for n, own in enumerate(sizes)]
    config = DataConfig(train=tuple(map(str, files)), seq_length=4, **CASES[case])
    began = build_datasets(config, files, [], 5, 70)
    dataset = began.train.with_phases([*began.train.schedule.phases, (21, (0.9, 0.1)), (28, (1.0, 1.0))])
    loader = Loader(dataset, 7, [(30, 33)])
    alone = Loader(dataset, 7, [(30, 33)])
    for step in range(9):
        parts = [part for rank in range(ranks) for part in loader.microbatches(step, 2, rank, ranks)]
        tokens = [
            row
            for part in parts
            for row, own in zip(part.tokens.tolist(), part.labels.tolist(), strict=True)
            if max(own) >= 0
        ]
        assert tokens == alone.batch(step).tokens.tolist()
        if step < 3:  # what came before a change is what it was
            assert tokens == Loader(began.train, 7).batch(step).tokens.tolist()
    assert loader.batch(4).tokens.tolist() != Loader(began.train, 7, [(30, 33)]).batch(4).tokens.tolist()
