"""Context parallelism: sequences that are cut over processes give what one process gives, and equal work to each."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neox.parallel.context import ordered, own_slices
from tests.parallel.helpers import compare

CP2 = "parallel.cp=2"
GPTNEO = ("use_parallel_residual=false", "position_embedding=learned", "local_layers=[1]", "local_window=8")


@pytest.mark.parametrize(
    ("world", "options"),
    [
        (2, (CP2, "tie_word_embeddings=true", "activation_checkpointing=full")),
        (4, (CP2, "parallel.zero=3", "data.segments=true", "global_batch_size=7")),
        pytest.param(2, (CP2, *GPTNEO, "data.segments=true"), marks=pytest.mark.slow),
        pytest.param(4, ("parallel.cp=4", *GPTNEO, "parallel.zero=2"), marks=pytest.mark.slow),
        pytest.param(4, (CP2, "parallel.tp=2", "parallel.sequence_parallel=true"), marks=pytest.mark.slow),
        pytest.param(4, (CP2, "parallel.dp_replicate=2"), marks=pytest.mark.slow),
    ],
)
def test_context_parallel_processes_equal_one(tmp_path, world, options):
    compare(tmp_path, world, *options)


@given(size=st.integers(1, 6), slice_length=st.integers(1, 4))
def test_slices_cover_a_sequence_once_and_cost_the_same(size, slice_length):
    sequence = torch.arange(2 * size * slice_length)[None]
    parts = [own_slices(sequence, rank, size) for rank in range(size)]
    assert torch.equal(ordered(torch.cat(parts, 1), size, 1), sequence)
    # A query at place t sees t + 1 keys.
    assert len({int((part + 1).sum()) for part in parts}) == 1
