"""The chunked loss: its value, its gradients and what it never allocates, against torch's loss of the full logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from neox.model import IGNORED
from neox.parallel.loss import cross_entropy
from tests.tiny import CONTEXT, ours, relative, tokens

CLOSE = 1e-5  # float32 against float64, of the largest value; measured: 1e-6


def case(tokens: int, width: int, vocab: int, bias: bool, ignored: float, seed: int):
    """Hidden states, head and labels, of which the fraction `ignored` is masked."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator)
    head = nn.Linear(width, vocab, bias=bias)
    with torch.no_grad():
        for p in head.parameters():
            p.normal_(generator=generator)
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < ignored] = IGNORED
    return hidden.requires_grad_(), head, labels


def reference(hidden, head, labels, scale, dtype=torch.float64):
    """Loss and gradients of hidden, weight and bias, from the full logits."""
    inputs = [t.detach().to(dtype).requires_grad_() for t in (hidden, *head.parameters())]
    logits = F.linear(*inputs)
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") * scale
    return loss.detach(), torch.autograd.grad(loss, inputs)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 40),
    width=st.integers(1, 9),
    vocab=st.integers(1, 30),
    chunk=st.integers(1, 50),
    bias=st.booleans(),
    ignored=st.sampled_from((0.0, 0.3, 1.0)),
    scale=st.sampled_from((1.0, 0.01, 3.0)),
    factor=st.sampled_from((1.0, -2.5)),
    seed=st.integers(0, 99),
)
def test_value_and_gradients_of_any_chunking(count, width, vocab, chunk, bias, ignored, scale, factor, seed):
    hidden, head, labels = case(count, width, vocab, bias, ignored, seed)
    expected, gradients = reference(hidden, head, labels, scale)
    loss = cross_entropy(hidden, head, labels, chunk=chunk, scale=scale)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert abs(loss.item() - expected.item()) <= CLOSE * max(1, abs(expected.item()))
    (loss * factor).backward()
    for p, expected in zip((hidden, *head.parameters()), gradients, strict=True):
        assert (p.grad - factor * expected).abs().max() <= CLOSE * max(1, expected.abs().max())


def test_leading_dims_do_not_matter():
    hidden, head, labels = case(24, 8, 20, True, 0.2, 0)
    flat = cross_entropy(hidden, head, labels)
    assert torch.equal(flat, cross_entropy(hidden.view(2, 3, 4, 8), head, labels.view(2, 3, 4)))


def test_large_logits_do_not_overflow():
    hidden, head, labels = case(8, 4, 20, False, 0, 0)
    loss = cross_entropy(hidden * 1e4, head, labels)
    expected, _ = reference(hidden * 1e4, head, labels, 1)
    assert abs(loss - expected) < CLOSE * expected
    loss.backward()
    assert hidden.grad.isfinite().all()


def test_all_labels_ignored_is_zero_with_zero_gradients():
    hidden, head, labels = case(10, 4, 20, True, 1.0, 0)
    loss = cross_entropy(hidden, head, labels, chunk=3, scale=1 / 10)
    loss.backward()
    assert loss == 0
    assert not any(p.grad.any() for p in (hidden, *head.parameters()))


@pytest.mark.parametrize("label", [-1, 20])
def test_a_label_that_is_no_token_fails(label):
    hidden, head, labels = case(10, 4, 20, False, 0, 0)
    labels[4] = label
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        cross_entropy(hidden, head, labels)


def test_a_second_backward_says_why_it_fails():
    hidden, head, labels = case(10, 4, 20, False, 0, 0)
    loss = cross_entropy(hidden, head, labels)
    loss.backward()
    with pytest.raises(RuntimeError, match="differentiated before"):
        loss.backward()


def test_a_graph_that_is_kept_is_differentiated_again():
    """As pipelines do that take the gradients of the hidden states first, and of the weight later."""
    hidden, head, labels = case(10, 4, 20, True, 0, 0)
    (2 * cross_entropy(hidden, head, labels)).backward()
    expected = [tensor.grad for tensor in (hidden, head.weight, head.bias)]
    loss = 2 * cross_entropy(hidden, head, labels)
    found = torch.autograd.grad(loss, hidden, retain_graph=True) + torch.autograd.grad(loss, [head.weight, head.bias])
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_is_right(frozen):
    hidden, head, labels = case(10, 4, 20, True, 0.2, 0)
    _, gradients = reference(hidden, head, labels, 1)
    inputs = {"hidden": hidden, "weight": head.weight, "bias": head.bias}
    inputs[frozen].requires_grad_(False)
    cross_entropy(hidden, head, labels, chunk=3).backward()
    for (name, given_), expected in zip(inputs.items(), gradients, strict=True):
        if name == frozen:
            assert given_.grad is None
        else:
            assert relative(given_.grad.double(), expected) < CLOSE


def test_tied_weights_collect_both_gradients():
    model, ids = ours(tie_word_embeddings=True), tokens()
    labels = ids.roll(-1, dims=1)
    cross_entropy(model(ids, head=False), model.embed_out, labels, chunk=7).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), reduction="sum").backward()
    assert "embed_out.weight" not in gradients
    for name, p in model.named_parameters():
        assert relative(gradients[name], p.grad) < 2 * CLOSE, name


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_under_autocast_products_are_of_16_bits_and_the_rest_is_not(dtype, unit):
    hidden, head, labels = case(512, 64, 100, True, 0.2, 0)
    with torch.no_grad():
        head.weight.mul_(0.1)
    expected, gradients = reference(hidden, head, labels, 1 / 512)
    with torch.autocast("cpu", dtype):
        loss = cross_entropy(hidden, head, labels, chunk=100, scale=1 / 512)
    loss.backward()
    assert loss.dtype == torch.float32
    # bfloat16 keeps 8 bits, float16 11: each product is off by up to a unit of its size, and such errors average out in
    # the sums.
    assert 0 < abs(loss - expected) < unit / 4 * expected
    for (name, p), theirs in zip((("hidden", hidden), *head.named_parameters()), gradients, strict=True):
        assert p.grad.dtype == torch.float32
        assert 0 < relative(p.grad.double(), theirs) < 2 * unit, name


def in_half(scale: float):
    """Gradients under fp16, and in float64, of a loss with this factor."""
    hidden, head, labels = case(512, 64, 100, False, 0.2, 0)
    with torch.no_grad():
        head.weight.mul_(0.1)
    with torch.autocast("cpu", torch.float16):
        cross_entropy(hidden, head, labels, chunk=100, scale=scale).backward()
    return (hidden.grad, head.weight.grad), reference(hidden, head, labels, scale)[1]


def test_a_loss_scale_keeps_small_gradients_alive_in_fp16():
    """A mean over 10^9 tokens has factors below fp16's smallest number, 6e-8; times 2^30 they are near one."""
    (_, head), _ = in_half(1e-9)
    assert not head.any()
    for found, expected in zip(*in_half(2**30 * 1e-9), strict=True):
        assert 0 < relative(found.double(), expected) < 2 * 2**-11


def test_a_loss_scale_that_is_too_large_shows_in_the_gradients():
    assert not all(gradient.isfinite().all() for gradient in in_half(2.0**20)[0])


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in elements, and the matrix products by name."""

    def __init__(self):
        super().__init__()
        self.elements, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel(), value.untyped_storage().nbytes() // 4)
        self.products += "mm" in func.__name__ or "matmul" in func.__name__
        return result


def test_the_full_logits_never_exist():
    """A step's largest tensor is the head's own gradient; with the full logits it is those."""
    vocab, rows = 400, 16
    model = ours(vocab_size=vocab)
    ids = tokens(rows, CONTEXT)
    with Largest() as chunked:
        cross_entropy(model(ids, head=False), model.embed_out, ids, chunk=20).backward()
    with Largest() as full:
        F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    assert full.elements == rows * CONTEXT * vocab
    assert chunked.elements <= max(vocab * 32, rows * CONTEXT * 4 * 32)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_evaluation_pays_for_no_gradient(guard):
    hidden, head, labels = case(30, 4, 20, False, 0.2, 0)
    with guard(), Largest() as seen:
        loss = cross_entropy(hidden, head, labels, chunk=10)
    assert seen.products == 3  # one a chunk
    assert abs(loss - reference(hidden, head, labels, 1)[0]) < 1e-3
