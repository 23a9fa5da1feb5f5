"""The decoder: against `transformers` in both directions, gradients included, and against itself computed plainly."""

import itertools
import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import neox
from neox.checkpoint import families
from neox.config import ModelConfig
from neox.model.cache import BLOCK, KVCache, KVPool, Span
from neox.model.decoder import GPTNeoX, init_std
from neox.model.rotary import rotary_angles, rotate
from tests.tiny import (
    CONTEXT,
    GPT_J,
    GPT_NEO,
    VOCAB,
    ours,
    read_by_transformers,
    relative,
    rewrite_config,
    theirs,
    tokens,
)

LOGITS = 1e-5  # float32, of the largest logit; measured: 2e-6
GRADIENTS = 2e-5  # float32, of the parameter's largest gradient; measured: 4e-6
EXACT = 1e-11  # the same in float64, where only the order of additions differs


def old_spelling(folder, pct, base):
    """config.json as transformers 4 wrote it."""
    drop = ("rope_parameters", "dtype", "attention_bias")
    rewrite_config(folder, drop, rotary_pct=pct, rotary_emb_base=base, torch_dtype="float32", rope_scaling=None)


def check_both_ways(reference: nn.Module, folder: Path, spell=None, length: int = 24, seed: int = 0) -> None:
    """Saved by transformers and loaded here, saved here and loaded there: the same logits each time."""
    ids = tokens(2, length, seed)
    reference.save_pretrained(folder / "theirs")
    if spell is not None:
        spell(folder / "theirs")
        again = read_by_transformers(folder / "theirs")
        assert relative(again(ids).logits, reference(ids).logits) == 0  # the rewriting itself changed nothing
    model, tokenizer = neox.load(folder / "theirs")
    assert tokenizer is None
    assert not model.training
    logits = model(ids)
    assert logits.dtype == torch.float32
    assert relative(logits, reference(ids).logits) <= LOGITS
    neox.save(model, folder / "ours")
    assert relative(read_by_transformers(folder / "ours")(ids).logits, logits) <= LOGITS
    for name, value in neox.load(folder / "ours")[0].state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


ACTIVATIONS = ("gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh")
GRID = list(itertools.product((True, False), ACTIVATIONS, (0.25, 0.5, 1.0)))


@torch.no_grad()
@pytest.mark.parametrize(("residual", "activation", "pct"), GRID)
def test_gpt_neox_and_transformers_give_the_same_logits(tmp_path, residual, activation, pct):
    # What is left of the grid is walked along with it; test_any_gpt_neox draws the combinations.
    number = GRID.index((residual, activation, pct))
    base = (10000.0, 500.0)[number % 2]
    reference = theirs(
        hidden_act=activation,
        use_parallel_residual=residual,
        rope_parameters={"rope_type": "default", "rope_theta": base, "partial_rotary_factor": pct},
        tie_word_embeddings=number // 2 % 2 == 0,
    )
    spell = (lambda folder: old_spelling(folder, pct, base)) if number % 3 == 0 else None
    check_both_ways(reference, tmp_path, spell)


@torch.no_grad()
@settings(max_examples=12, deadline=None)
@given(
    heads=st.integers(1, 4),
    head_dim=st.sampled_from((8, 24, 32)),
    layers=st.integers(1, 3),
    pct=st.sampled_from((0.25, 0.5, 1.0)),
    base=st.sampled_from((10.0, 10000.0, 1e6)),
    activation=st.sampled_from(ACTIVATIONS),
    residual=st.booleans(),
    tied=st.booleans(),
    bias=st.booleans(),
    old=st.booleans(),
    ffn=st.integers(1, 70),
    eps=st.sampled_from((1e-5, 1e-3)),
    length=st.integers(1, CONTEXT),
    seed=st.integers(0, 1000),
)
def test_any_gpt_neox(
    heads, head_dim, layers, pct, base, activation, residual, tied, bias, old, ffn, eps, length, seed
):
    reference = theirs(
        seed=seed,
        hidden_size=heads * head_dim,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        intermediate_size=ffn,
        hidden_act=activation,
        use_parallel_residual=residual,
        tie_word_embeddings=tied,
        attention_bias=bias,
        layer_norm_eps=eps,
        rope_parameters={"rope_type": "default", "rope_theta": base, "partial_rotary_factor": pct},
    )
    spell = (lambda folder: old_spelling(folder, pct, base)) if old and bias else None
    with tempfile.TemporaryDirectory() as folder:
        check_both_ways(reference, Path(folder), spell, length, seed)


RELATIVES = [
    pytest.param("gptj", {}, id="gptj"),
    pytest.param("gptj", {"rotary_dim": 16, "n_inner": 40, "n_layer": 3}, id="gptj-all-rotary"),
    pytest.param("gptj", {"tie_word_embeddings": True, "n_embd": 48, "rotary_dim": 2}, id="gptj-tied"),
    pytest.param("gptj", {"n_embd": 98, "rotary_dim": 8}, id="gptj-49-dims-a-head"),
    pytest.param("gpt_neo", {}, id="gpt_neo"),
    pytest.param("gpt_neo", {"window_size": 1, "intermediate_size": 40}, id="gpt_neo-sees-only-itself"),
    pytest.param("gpt_neo", {"window_size": 24}, id="gpt_neo-window-as-long"),
    pytest.param("gpt_neo", {"tie_word_embeddings": False, "hidden_size": 48}, id="gpt_neo-untied"),
    pytest.param(
        "gpt_neo", {"num_layers": 3, "attention_types": [[["local"], 2], [["global"], 1]]}, id="gpt_neo-local-first"
    ),
]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "changes"), RELATIVES)
def test_the_relatives_and_transformers_give_the_same_logits(tmp_path, kind, changes):
    check_both_ways(theirs(kind, **changes), tmp_path)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gpt_neox", {}),
        ("gpt_neox", {"use_parallel_residual": False, "tie_word_embeddings": True, "hidden_act": "gelu_fast"}),
        ("gpt_neox", {"attention_bias": False}),
        ("gptj", {}),
        ("gpt_neo", {}),
    ],
)
def test_gradients_agree_parameter_by_parameter(tmp_path, kind, changes):
    reference = theirs(kind, **changes)
    reference.save_pretrained(tmp_path / "theirs")
    model, _ = neox.load(tmp_path / "theirs")
    ids = tokens()
    weights = torch.randn(2, 24, VOCAB, generator=torch.Generator().manual_seed(1))
    (reference(ids).logits * weights).sum().backward()
    (model(ids) * weights).sum().backward()
    expected = {n.replace("lm_head", "embed_out") if kind == "gpt_neox" else n: p.grad
                for n, p in reference.named_parameters()}  # fmt: skip
    for name, parameter in model.named_parameters():
        names = families.their_names(model.config, name)
        parts = families.unfuse(model.config, parameter.grad) if len(names) > 1 else [parameter.grad]
        for theirs_name, part in zip(names, parts, strict=True):
            assert relative(part, expected.pop(theirs_name)) <= GRADIENTS, theirs_name
    assert expected == {}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt_neox", "gptj", "gpt_neo"])
def test_greedy_continuation_agrees_token_for_token(tmp_path, kind):
    reference = theirs(kind)
    reference.save_pretrained(tmp_path / "theirs")
    model, _ = neox.load(tmp_path / "theirs")
    ids = tokens(3, 8)
    config = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = reference.generate(ids, attention_mask=torch.ones_like(ids), **config)
    pool = KVPool(model.config, 3 * CONTEXT // BLOCK)
    pool.keys.zero_(), pool.values.zero_()
    tables = torch.randperm(3 * CONTEXT // BLOCK, generator=torch.Generator().manual_seed(0)).view(3, -1).tolist()
    step, start = ids, 0
    while ids.shape[1] < 38:
        spans = [Span(table, start, step.shape[1]) for table in tables]
        cache = KVCache(pool, spans, model.config.local_window)
        logits = model(step.reshape(1, -1), cache.positions, cache).view(3, step.shape[1], -1)
        start, step = start + step.shape[1], logits[:, -1:].argmax(-1)
        ids = torch.cat((ids, step), dim=1)
    assert ids.tolist() == expected.tolist()


@torch.no_grad()
def test_half_precision_stays_half_and_near(tmp_path):
    neox.save(ours(), tmp_path / "model")
    exact = ours()(tokens())
    for dtype, unit in (("bf16", 2**-8), ("fp16", 2**-11)):
        model, _ = neox.load(tmp_path / "model", dtype=dtype)
        logits = model(tokens())
        assert {p.dtype for p in model.parameters()} == {logits.dtype} == {neox.system.device.resolve_dtype(dtype)}
        assert 0 < relative(logits.float(), exact) < 16 * unit


FAMILIES = pytest.mark.parametrize(
    "flags",
    [{}, {"use_parallel_residual": False, "rotary_pct": 1.0}, GPT_J, GPT_NEO],
    ids=["parallel", "serial", "gptj", "gpt_neo"],
)


@torch.no_grad()
@FAMILIES
@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_packed_documents_do_not_see_each_other(flags, lengths, seed):
    model = ours(**flags).double()
    rows = tokens(2, sum(lengths), seed)
    segments = torch.cat([torch.full((n,), number) for number, n in enumerate(lengths)]).expand(2, -1)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    packed = model(rows, positions, segments=segments)
    alone = torch.cat([model(document) for document in rows.split(lengths, dim=1)], dim=1)
    assert relative(packed, alone) <= EXACT


@torch.no_grad()
@FAMILIES
@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    chunks=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    scattered=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_cache_filled_in_chunks_equals_the_full_pass(flags, lengths, chunks, scattered, seed):
    """Sequences of different lengths, cut differently, packed in one row; in blocks in a row and in blocks anywhere."""
    model = ours(**flags).double()
    rows = [tokens(1, n, seed + i)[0] for i, n in enumerate(lengths)]
    each = -(-max(lengths) // BLOCK)
    pool = KVPool(model.config, each * len(rows), dtype=torch.float64)
    pool.keys.fill_(1e6)  # what no sequence has written must not be seen
    pool.values.fill_(1e9)
    order = torch.arange(each * len(rows))
    if scattered:
        order = torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))
    tables = order.view(len(rows), each).tolist()
    done, logits = [0] * len(rows), [[] for _ in rows]
    sizes = itertools.cycle(chunks)
    while left := [i for i, row in enumerate(rows) if done[i] < len(row)]:
        counts = [min(next(sizes), len(rows[i]) - done[i]) for i in left]
        packed = torch.cat([rows[i][done[i] : done[i] + n] for i, n in zip(left, counts, strict=True)])
        spans = [Span(tables[i], done[i], n) for i, n in zip(left, counts, strict=True)]
        cache = KVCache(pool, spans, model.config.local_window)
        out = model(packed[None], cache.positions, cache)[0]
        for i, part in zip(left, out.split(counts), strict=True):
            logits[i].append(part)
            done[i] += len(part)
    for i, row in enumerate(rows):
        assert relative(torch.cat(logits[i]), model(row[None])[0]) <= EXACT


@torch.no_grad()
@FAMILIES
def test_no_token_sees_what_follows(flags):
    model, ids = ours(**flags), tokens(1, 20)
    changed = ids.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % VOCAB
    assert torch.equal(model(ids)[0, :12], model(changed)[0, :12])
    assert not torch.allclose(model(ids)[0, 12:], model(changed)[0, 12:])


@torch.no_grad()
def test_positions_are_respected():
    ids = tokens(2, 10)
    for flags in ({}, GPT_J, GPT_NEO):
        model = ours(**flags)
        assert torch.equal(model(ids), model(ids, torch.arange(10).expand(2, -1)))
        # Who sees whom is a matter of the order in the row, whatever the positions.
        backwards = torch.arange(9, -1, -1).expand(2, -1)
        one_document = model(ids, backwards, segments=torch.zeros_like(ids))
        assert relative(one_document, model(ids, backwards)) <= LOGITS
    # Rotary attention depends on distances only; a learned table on the position itself.
    rotary, learned = ours(rotary_pct=1.0), ours(**GPT_NEO)
    shifted = torch.arange(30, 40).expand(2, -1)
    assert relative(rotary(ids, shifted), rotary(ids)) < 1e-4
    assert relative(rotary(ids, 2 * shifted), rotary(ids)) > 1e-2
    before = learned(ids, shifted)
    learned.embed_positions.weight[:10] = learned.embed_positions.weight[30:40].clone()
    assert torch.equal(learned(ids), before)


@settings(max_examples=30, deadline=None)
@given(
    half=st.integers(1, 8),
    rest=st.integers(0, 6),
    base=st.floats(2, 1e6),
    position=st.integers(0, 2048),
    seed=st.integers(0, 99),
)
def test_rotation_is_multiplication_by_a_unit_complex_number(half, rest, base, position, seed):
    x = torch.randn(3, 1, 2, 1, 2 * half + rest, generator=torch.Generator().manual_seed(seed))
    width = 2 * half + rest
    pct = min((2 * half + 0.5) / width, 1.0)
    config = ModelConfig(hidden_size=width, num_attention_heads=1, rotary_pct=pct, rotary_emb_base=base)
    assert config.rotary_dim == 2 * half
    turned = rotate(x, *rotary_angles(config, torch.tensor([[position]])))
    for which in range(3):
        turn = [complex(math.cos(a), math.sin(a)) for a in (position * base ** (-i / half) for i in range(half))]
        for head in range(2):
            v, w = x[which, 0, head, 0].tolist(), turned[which, 0, head, 0].tolist()
            for i in range(half):
                expected = complex(v[i], v[half + i]) * (turn[i] if which < 2 else 1)
                # float32 knows an angle of 2048 radians to about 1e-4
                assert abs(complex(w[i], w[half + i]) - expected) < 1e-3 * (1 + abs(expected))
            assert w[2 * half :] == v[2 * half :]


@torch.no_grad()
def test_without_its_head_the_model_gives_the_final_states():
    model = ours(head_bias=True)
    assert torch.equal(model.embed_out(model(tokens(), head=False)), model(tokens()))


def test_a_sequence_beyond_the_context_is_refused():
    model = ours()
    model(tokens(1, CONTEXT))
    with pytest.raises(ValueError, match=r"^a sequence of 65 tokens exceeds .* context of 64: [^\n]*$"):
        model(tokens(1, CONTEXT + 1))
    pool = KVPool(model.config, 5)
    cache = KVCache(pool, [Span(range(5), CONTEXT, 1)])
    with pytest.raises(ValueError, match="a sequence of 65 tokens"):
        model(tokens(1, 1), cache.positions, cache)


# Initialisation


def built(seed: int = 1234, **changes) -> GPTNeoX:
    shape = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    return GPTNeoX(ModelConfig(**(shape | changes))).initialize(seed)


@pytest.mark.parametrize("method", ["small_init", "normal"])
def test_initial_weights_follow_the_formulas(method):
    model = built(init_method=method, initializer_range=0.03, position_embedding="learned")
    residual_outputs = 0
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any()
            continue
        if "norm" in name:
            assert (p == 1).all()
            continue
        output = "dense.weight" in name or "4h_to_h.weight" in name
        residual_outputs += output
        if method == "small_init":
            std = 2 / (3 * 64**0.5) if output else (2 / (64 + 4 * 64)) ** 0.5
        else:
            std = 0.03 / (2 * 3) ** 0.5 if output else 0.03
        assert math.isclose(init_std(model.config, name), std)
        # Five standard errors of each statistic; the draw is fixed, so it holds today and always.
        n = p.numel()
        assert abs(p.mean()) < 5 * std / n**0.5, name
        assert abs(p.std() - std) < 5 * std / (2 * n) ** 0.5, name
        inside = (p.abs() < std).float().mean()
        assert abs(inside - 0.6827) < 5 * (0.6827 * 0.3173 / n) ** 0.5, name
    assert residual_outputs == 6


def test_initial_weights_are_a_function_of_seed_and_name():
    """Of nothing else: not of what exists beside them, the order, the global generator or where they were built."""
    state = built().state_dict()
    before = torch.get_rng_state()
    torch.manual_seed(99)
    deeper = built(num_hidden_layers=5, vocab_size=300, rotary_pct=1.0).state_dict()
    for name in set(state) - {"embed_in.weight", "embed_out.weight"}:
        scale = 5 / 3 if name.endswith(("dense.weight", "4h_to_h.weight")) else 1
        assert torch.allclose(deeper[name] * scale, state[name], rtol=1e-6), name

    backwards = GPTNeoX(built().config)
    names = list(backwards.named_parameters())
    backwards.named_parameters = lambda: reversed(names)
    drawn = torch.get_rng_state()
    backwards.initialize()
    assert torch.equal(torch.get_rng_state(), drawn)
    with torch.device("meta"):
        elsewhere = GPTNeoX(backwards.config)
    elsewhere.to_empty(device="cpu").initialize()
    for other in (backwards, elsewhere):
        assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    torch.set_rng_state(before)


def test_initial_weights_of_no_two_names_or_seeds_agree():
    drawn = [p for seed in (0, 1) for n, p in built(seed).named_parameters() if p.ndim == 2]
    for a, b in itertools.combinations(drawn, 2):
        if a.shape == b.shape:
            correlation = torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]
            assert abs(correlation) < 5 / a.numel() ** 0.5


def test_a_tied_head_stays_tied_wherever_it_is_built():
    with torch.device("meta"):
        model = GPTNeoX(ModelConfig(tie_word_embeddings=True, vocab_size=64, hidden_size=32))
    model.to_empty(device="cpu").initialize()
    assert model.embed_out.weight is model.embed_in.weight
    assert torch.equal(model.embed_in.weight, GPTNeoX(model.config).initialize().embed_in.weight)
