"""Models with packed weights, against the same model with the stored weights in plain layers."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from neox.checkpoint import load
from neox.checkpoint import save as save_huggingface
from neox.config import ModelConfig, presets
from neox.generate import Engine, Sampling
from neox.model.decoder import GPTNeoX
from neox.planning import weight_bytes
from neox.quantization import kernels, packed
from neox.quantization.kernels import layout
from neox.quickstart.corpus import build_corpus
from tests import tiny

FAMILIES = {"neox": {}, "gpt-j": tiny.GPT_J, "gpt-neo": tiny.GPT_NEO}


def as_stored(model: GPTNeoX, kind: kernels.Kind) -> GPTNeoX:
    """A copy in plain layers, float32, that hold what a float `kind` stores."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.Linear):
            module.weight.data = module.weight.data.to(kernels.FLOATS[kind]).float()
    return model


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16"])
@torch.no_grad()
def test_logits_are_those_of_the_stored_weights(kind):
    for family, flags in FAMILIES.items():
        model = tiny.ours(**flags)
        expected = as_stored(model, kind)(tiny.tokens())
        assert tiny.relative(packed.quantize(model, kind)(tiny.tokens()), expected) < 1e-5, family


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["w16a16", "int8", "int4"])
@torch.no_grad()
def test_every_layer_with_rounded_inputs_multiplies_by_its_stored_weight(kind, family):
    """Layer by layer: between two models a value half-way between two steps may fall to either side."""
    model = tiny.ours(**FAMILIES[family])
    plain = {name: copy.deepcopy(module) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    model, seen = packed.quantize(model, kind), []
    for name, module in model.named_modules():
        if isinstance(module, packed.PackedLinear):
            module.register_forward_hook(lambda module, x, y, name=name: seen.append((name, module, x[0], y)))
    model(tiny.tokens())
    assert {name for name, *_ in seen} == set(plain)
    for name, module, x, y in seen:
        rows = x.flatten(0, -2)
        entering = layout.round_activations(rows, module.kind)
        wanted = F.linear(entering, kernels.unpack(kernels.pack(plain[name].weight, module.kind)), plain[name].bias)
        assert tiny.relative(y.flatten(0, -2), wanted) < 1e-5


@pytest.mark.parametrize(("kind", "family"), [("fp16", "neox"), ("bf16", "gpt-j"), ("bf16", "gpt-neo")])
@torch.no_grad()
def test_a_model_of_16_bits_loses_nothing(kind, family):
    model = tiny.ours(**FAMILIES[family])
    for name, parameter in model.named_parameters():
        if name.endswith("weight"):
            parameter.copy_(parameter.to(kernels.FLOATS[kind]))
    plain = copy.deepcopy(model)
    small = packed.quantize(model, kind)
    assert tiny.relative(small(tiny.tokens()), plain(tiny.tokens())) < 1e-5
    prompts, sampling = [[5, 6, 7], [1], [9] * 20], Sampling(max_tokens=12, stop_at_eod=False)
    assert Engine(small).generate(prompts, sampling) == Engine(plain).generate(prompts, sampling)


@pytest.mark.parametrize("flags", FAMILIES.values(), ids=FAMILIES)
@torch.no_grad()
def test_bfloat16_activations_lose_less_than_transformers_in_bfloat16(tmp_path, flags):
    """Here only what enters a product is rounded, and what is added up is float32."""
    model = tiny.ours(**flags)
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    save_huggingface(model, tmp_path)
    theirs, tokens = tiny.read_by_transformers(tmp_path), tiny.tokens()
    exact = theirs(tokens).logits
    found = packed.quantize(model, "w16a16")(tokens)
    assert 1e-4 < tiny.relative(found, exact) < tiny.relative(theirs.bfloat16()(tokens).logits.float(), exact)


def shape(**changes: object) -> ModelConfig:
    small = {"vocab_size": 96, "hidden_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4}
    return ModelConfig(**(small | {"max_position_embeddings": 64} | changes))


@pytest.mark.parametrize("tied", [False, True])
def test_memory_of_every_kind_is_the_estimate(tied):
    for kind in ("fp16", "bf16", "w16a16", "int8", "int4"):
        held, estimate = memory_and_estimate(kind, tied)
        assert held == estimate, kind


def memory_and_estimate(kind: kernels.Kind, tied: bool) -> tuple[int, int]:
    """Norms and biases, which are counted with 2 bytes, take 4; and int4 rounds K up to whole groups of 128."""
    config = shape(tie_word_embeddings=tied)
    model = packed.quantize(GPTNeoX(config).initialize(), kind)
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    small = sum(p.numel() for p in model.parameters()) + sum(
        m.bias.numel() for m in model.modules() if isinstance(m, packed.PackedLinear) and m.bias is not None
    )
    padding = sum(
        m.out_features * (-m.in_features % 128) // (1 if m.kind == "int8" else 2)
        for m in model.modules()
        if isinstance(m, packed.PackedLinear) and m.kind.startswith("int")
    )
    return sum(tensors.values()), weight_bytes(config, kind) + 2 * small + padding


def test_published_shapes_need_no_padding():
    for name in ("neox-20b", "pythia-160m", "pythia-1.4b", "pythia-12b", "gpt-j-6b"):
        config = ModelConfig(**presets.preset(name)["model"])
        assert config.hidden_size % 128 == config.ffn_size % 128 == config.vocab_size % 16 == 0


def test_a_tied_head_and_its_embedding_are_one_copy():
    model = packed.quantize(tiny.ours(**tiny.GPT_NEO), "int4")
    assert model.embed_in.packed.data_ptr() == model.embed_out.packed.data_ptr()
    assert model.embed_out.kind == "fp16"


def test_the_kind_of_every_part():
    model = packed.quantize(tiny.ours(**tiny.GPT_J), "int4")
    assert {m.kind for m in model.layers.modules() if isinstance(m, packed.PackedLinear)} == {"int4"}
    assert (model.embed_out.kind, model.embed_in.weight.dtype) == ("int8", torch.float16)
    assert not any(isinstance(m, nn.Linear) for m in model.modules())
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in model.parameters())


def test_an_embedding_beyond_float16_takes_bfloat16():
    model = tiny.ours()
    model.embed_in.weight.data[3] = 1e5
    assert packed.quantize(model, "int8").embed_in.weight.dtype == torch.bfloat16


def test_a_damaged_weight_is_named():
    model = tiny.ours()
    model.layers[1].mlp.dense_4h_to_h.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.dense_4h_to_h\.weight holds values that are not finite"):
        packed.quantize(model, "int8")


def test_packed_weights_cannot_be_trained():
    model = packed.quantize(tiny.ours(), "fp16")
    with pytest.raises(ValueError, match="no backward pass"):
        model.layers[0].attention.dense(torch.zeros(1, 32, requires_grad=True))


def test_packed_weights_are_not_saved_as_if_they_were_the_model(tmp_path):
    with pytest.raises(ValueError, match=r"embed_in\.weight is not there as it was trained"):
        save_huggingface(packed.quantize(tiny.ours(), "int8"), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_what_loses_nothing(monkeypatch):
    monkeypatch.setattr(kernels, "compiled", lambda: True)
    kinds = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp32"}
    assert {dtype: packed.lossless(dtype) for dtype in kinds} == kinds
    monkeypatch.setattr(kernels, "compiled", lambda: False)
    assert packed.lossless(torch.float16) is None


@pytest.mark.slow
def test_perplexity_of_a_trained_model():
    """Bytes of the quickstart's corpus, a minute of training: what storing costs on text that was held out.

    A model trained for longer loses more to 4 bits; docs/weights.md has such figures.
    """
    corpus, length = build_corpus(), 128
    train, held_out = (torch.tensor(list(part)) for part in (corpus.train_bytes[:4_000_000], corpus.heldout_bytes))
    shape = {"vocab_size": 256, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = GPTNeoX(ModelConfig(**shape, max_position_embeddings=length)).initialize(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        starts = torch.randint(len(train) - length, (16, 1), generator=generator)
        rows = train[starts + torch.arange(length)]
        F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.inference_mode()
    def perplexity(model: GPTNeoX) -> float:
        rows = held_out[: 200 * length].view(-1, length)
        return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).exp().item()

    plain = perplexity(model.eval())
    assert plain < 20  # it has learned: 256 before
    cost = {kind: perplexity(packed.quantize(copy.deepcopy(model), kind)) / plain - 1 for kind in kernels.KINDS}
    bounds = {"fp32": 1e-6, "fp16": 2e-4, "bf16": 1e-3, "w16a16": 1e-3, "int8": 3e-3, "int4": 2e-2}
    assert all(abs(cost[kind]) < bound for kind, bound in bounds.items()), cost
    assert cost["int4"] != 0 != cost["int8"]


@pytest.mark.parametrize("flags", [{}, {"tie_word_embeddings": True}, tiny.GPT_J], ids=["untied", "tied", "gpt-j"])
@torch.no_grad()
def test_packed_while_loading_is_packed_afterwards(tmp_path, flags):
    save_huggingface(tiny.ours(**flags), tmp_path / "model")
    for kind in kernels.KINDS:
        afterwards = packed.quantize(load(tmp_path / "model")[0], kind)
        meanwhile = packed.quantize(load(tmp_path / "model", transform=packed.packing(kind))[0], kind)
        types = [[type(module) for module in model.modules()] for model in (meanwhile, afterwards)]
        assert types[0] == types[1], kind
        assert torch.equal(meanwhile(tiny.tokens()), afterwards(tiny.tokens())), kind
