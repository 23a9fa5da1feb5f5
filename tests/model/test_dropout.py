"""Dropout: nothing outside training, the right share and scale inside, and in the places where transformers has it."""

import json
import math
from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F

import neox.model.decoder
from neox.checkpoint import families
from neox.config import ModelConfig
from neox.model.decoder import dropped
from tests.tiny import GPT_J, GPT_NEO, ours, relative, theirs, tokens

NEOX = {"hidden_act": "gelu"}
ALL = {"hidden_dropout": 0.1, "attention_dropout": 0.2}
FAMILIES = {
    "gpt_neox": ({"hidden_dropout": 0.1, "attention_dropout": 0.2}, NEOX | ALL),
    "gptj": ({"resid_pdrop": 0.1, "attn_pdrop": 0.2, "embd_pdrop": 0.3}, GPT_J | ALL | {"embedding_dropout": 0.3}),
    "gpt_neo": (
        {"resid_dropout": 0.1, "attention_dropout": 0.2, "embed_dropout": 0.3},
        GPT_NEO | ALL | {"embedding_dropout": 0.3},
    ),
}


def plain(x, p=0.5, training=True, inplace=False):
    """Stands for F.dropout: no draws, and a factor that tells which fraction was asked for."""
    return x * (1 + p) if training else x


def attention(q, k, v, attn_mask=None, is_causal=False, scale=None, dropout_p=0.0):
    """scaled_dot_product_attention from its definition, with dropout as above."""
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    mask = torch.ones(scores.shape[-2:]).tril().bool() if is_causal else attn_mask
    return plain(scores.masked_fill(~mask, -math.inf).softmax(-1), dropout_p) @ v


@pytest.mark.parametrize("kind", FAMILIES)
def test_dropout_is_where_transformers_has_it(kind, monkeypatch):
    """With dropout that draws nothing in its place, training outputs are equal up to rounding; in evaluation not."""
    reference = theirs(kind, **FAMILIES[kind][0]).train()
    config = families.read_config(reference.config.to_dict())
    assert config.dropout == (0.1 if kind == "gpt_neox" else 0.3, 0.1, 0.2)
    model = ours(**config.model_dump())
    stored = reference.state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            names = families.their_names(config, name)
            if kind == "gpt_neox" and name == "embed_out.weight" and names[0] not in stored:
                names = ("lm_head.weight",)
            parameter.copy_(families.fuse(config, [stored[each] for each in names]))
    model.train()
    monkeypatch.setattr(F, "dropout", plain)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    with torch.no_grad():
        expected = reference(tokens()).logits
        assert relative(model(tokens()), expected) < 1e-5
        assert relative(model.eval()(tokens()), expected) > 1e-3


@pytest.mark.parametrize("kind", FAMILIES)
def test_configs_carry_it_both_ways(kind):
    their_keys, flags = FAMILIES[kind]
    raw = json.loads(json.dumps(families.write_config(ours(**flags).config, torch.float32, 0)))
    assert {key: raw[key] for key in their_keys} == their_keys
    assert families.read_config(raw).dropout == ours(**flags).config.dropout
    for key in their_keys:
        raw.pop(key)
    assert families.read_config(raw).dropout == (0, 0, 0)


def test_gpt_neox_has_one_number_for_embedding_and_branches():
    same = ModelConfig(**ALL, embedding_dropout=0.1)
    assert families.read_config(families.write_config(same, torch.float32, 0)).dropout == same.dropout
    with pytest.raises(ValueError, match="embedding_dropout = 0.3 cannot be written as a Hugging Face gpt_neox model"):
        families.write_config(ModelConfig(**ALL, embedding_dropout=0.3), torch.float32, 0)


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILIES)
def test_outside_training_and_at_zero_there_is_none_and_nothing_is_drawn(kind):
    flags = FAMILIES[kind][1]
    none = flags | {"hidden_dropout": 0.0, "attention_dropout": 0.0, "embedding_dropout": None}
    without, silent, active = ours(**none), ours(**none).train(), ours(**flags)
    before = torch.get_rng_state()
    expected = without(tokens())
    assert torch.equal(silent(tokens()), expected)
    assert torch.equal(active(tokens()), expected)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(active.train()(tokens()), expected)


@pytest.mark.parametrize("p", [0.1, 0.7])
def test_its_share_scale_and_expectation(p):
    """Of n = 10^6 values, n p are zeroed within five standard deviations, the others divided by 1 - p."""
    n = 10**6
    torch.manual_seed(0)
    x = torch.rand(n) + 1
    y = dropped(x, p, True)
    kept = y != 0
    sigma = math.sqrt(n * p * (1 - p))
    assert abs(int((~kept).sum()) - n * p) < 5 * sigma
    torch.testing.assert_close(y[kept], x[kept] / (1 - p))
    assert abs((y.sum() - x.sum()).item()) < 5 * 2 * sigma / (1 - p)
    assert dropped(x, p, False) is x


def test_attention_drops_probabilities():
    """Uniform attention onto unit vectors: row i of the output is its probabilities, 1 / (i + 1) each."""
    T, p = 64, 0.25
    layer = ours(hidden_size=T, num_attention_heads=1, rotary_pct=0.0, attention_dropout=p).layers[0].attention.train()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.query_key_value.weight[2 * T :] = torch.eye(T)
        layer.dense.weight.copy_(torch.eye(T))
        context = neox.model.decoder.Context(None, None, None, None)
        torch.manual_seed(0)
        rows = layer(torch.eye(T).expand(20, T, T), context)
    share = torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None] / (1 - p)
    kept = rows != 0
    torch.testing.assert_close(rows, kept * share)
    seen = 20 * T * (T + 1) / 2
    assert abs(int(kept.sum()) - seen * (1 - p)) < 5 * math.sqrt(seen * p * (1 - p))


@pytest.mark.parametrize("kind", FAMILIES)
def test_recomputed_norms_leave_dropout_alone(kind, monkeypatch):
    """Gradients with recomputed norms and activations are those with everything kept, bit for bit."""
    gradients = []
    for _ in range(2):
        model = ours(**FAMILIES[kind][1]).train()
        torch.manual_seed(1)
        model(tokens()).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        monkeypatch.setattr(neox.model.decoder, "recomputed", lambda *_: nullcontext())
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
