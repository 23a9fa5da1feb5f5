"""Parameters, FLOPs and memory against published totals, Hugging Face's models, and slow counts."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neox import planning
from neox.config import Config, ModelConfig, load_config, presets
from neox.model import flops
from neox.model.training_memory import STATE, logits_bytes, one_device
from neox.quantization.kinds import KINDS

PUBLISHED = {  # total, non-embedding: model cards of GPT-NeoX-20B and Pythia
    "neox-20b": (20_554_567_680, 19_934_859_264),
    "pythia-14m": (14_067_712, 1_189_888),
    "pythia-31m": (30_494_720, 4_739_072),
    "pythia-70m": (70_426_624, 18_915_328),
    "pythia-160m": (162_322_944, 85_056_000),
    "pythia-410m": (405_334_016, 302_311_424),
    "pythia-1b": (1_011_781_632, 805_736_448),
    "pythia-1.4b": (1_414_647_808, 1_208_602_624),
    "pythia-2.8b": (2_775_208_960, 2_517_652_480),
    "pythia-6.9b": (6_857_302_016, 6_444_163_072),
    "pythia-12b": (11_846_072_320, 11_327_027_200),
}


def hugging_face(model: ModelConfig, **options):
    """The same model as transformers builds it, without memory for its weights."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    layers, heads, width = model.num_hidden_layers, model.num_attention_heads, model.hidden_size
    if model.model_type == "gpt_neox":
        config = transformers.GPTNeoXConfig(
            vocab_size=model.vocab_size,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=model.ffn_size,
            use_parallel_residual=model.use_parallel_residual,
            tie_word_embeddings=model.tie_word_embeddings,
            **options,
        )
        family = transformers.GPTNeoXForCausalLM
    elif model.model_type == "gptj":
        config = transformers.GPTJConfig(
            vocab_size=model.vocab_size, n_embd=width, n_layer=layers, n_head=heads, rotary_dim=model.rotary_dim
        )
        family = transformers.GPTJForCausalLM
    else:
        types = [[["global", "local"], layers // 2]]
        config = transformers.GPTNeoConfig(
            vocab_size=model.vocab_size, hidden_size=width, num_layers=layers, num_heads=heads, attention_types=types
        )
        family = transformers.GPTNeoForCausalLM
    with torch.device("meta"):
        return family(config)


shapes = st.builds(
    lambda heads, dim, layers, local, **rest: ModelConfig(
        hidden_size=heads * dim,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        local_layers=tuple(range(min(local, layers))),
        **rest,
    ),
    heads=st.integers(1, 4),
    dim=st.sampled_from([8, 16]),
    layers=st.integers(1, 4),
    local=st.integers(0, 4),
    local_window=st.integers(1, 12),
    vocab_size=st.integers(1, 300),
    intermediate_size=st.none() | st.integers(1, 300),
    tie_word_embeddings=st.booleans(),
)

# --- parameters ------------------------------------------------------------------------------------------------------


def test_parameter_counts_are_the_published_totals():
    for name, totals in PUBLISHED.items():
        counted = flops.parameters(load_config(name).model)
        assert (counted.total, counted.non_embedding) == totals, name
    assert flops.parameters(load_config("neox-175b").model).total == 175_197_806_592


def hugging_face_parameters(model):
    """Parameters by component, counted tensor by tensor."""
    counted = dict.fromkeys(("embedding", "attention", "mlp", "norms", "head"), 0)
    for key, weight in hugging_face(model).named_parameters():
        if "lm_head" in key or "embed_out" in key:
            part = "head"
        elif "embed_in" in key or ".wte." in key or ".wpe." in key:
            part = "embedding"
        elif "norm" in key or ".ln_" in key:
            part = "norms"
        else:
            part = "mlp" if ".mlp." in key else "attention"
        counted[part] += weight.numel()
    return counted


def test_parameters_of_every_preset_are_those_of_hugging_face():
    for name in presets.names():
        model = load_config(name).model
        counted, ours = hugging_face_parameters(model), flops.parameters(model)
        assert {part: getattr(ours, part) for part in counted} == counted, name
        assert ours.total == sum(counted.values()), name


# --- FLOPs -----------------------------------------------------------------------------------------------------------


@given(model=shapes, tokens=st.integers(1, 20), past=st.integers(0, 20))
def test_attention_pairs_are_what_the_mask_keeps(model, tokens, past):
    causal = full = 0
    for layer in range(model.num_hidden_layers):
        window = model.local_window if layer in model.local_layers else math.inf
        for query in range(past, past + tokens):
            causal += sum(query - window < key <= query for key in range(past + tokens))
            full += min(window, past + tokens)
    assert flops.attention_pairs(model, tokens, past) == causal
    assert flops.attention_pairs(model, tokens, past, causal=False) == full


@pytest.mark.parametrize("tied", [False, True])
def test_forward_flops_are_those_torch_counts(tied):
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    model = ModelConfig(vocab_size=96, hidden_size=64, num_hidden_layers=3, tie_word_embeddings=tied)
    theirs = hugging_face(model, attn_implementation="eager").to_empty(device="cpu")
    tokens = 24
    with FlopCounterMode(display=False) as counter:
        theirs(torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    # The counter sees matrix products only; the convention charges 2 FLOPs for biases and norms as well.
    vectors = sum(weight.numel() for weight in theirs.parameters() if weight.ndim == 1)
    ours = flops.forward_flops(model, tokens, causal=False)
    assert ours - 2 * vectors * tokens == counter.get_total_flops()


@given(model=shapes, prompt=st.integers(1, 12), new=st.integers(1, 12))
def test_generation_costs_as_much_as_reading_the_same_tokens(model, prompt, new):
    """With a cache every token passes the blocks once, and every pair is formed once."""
    length = prompt + new - 1
    assert flops.generate_flops(model, prompt, new) == flops.forward_flops(model, length, scored=new)


def test_training_flops_follow_the_published_formulas():
    model = load_config("neox-20b").model
    layers, width, length, vocab = 44, 6144, 2048, 50432
    # Megatron (Narayanan et al. 2021, equation 3), without its recomputed forward pass and with the head's 6VC.
    megatron = 72 * layers * width**2 * (1 + length / (6 * width)) + 6 * vocab * width
    vectors = 6 * (13 * layers * width + 2 * width)
    assert flops.train_flops_per_token(model, length) == pytest.approx(megatron + vectors, rel=1e-12)
    # 6N + 12LCT, with causal keeping (T + 1) / 2 keys in place of T.
    saved = 12 * layers * width * (length - (length + 1) / 2)
    causal = flops.train_flops_per_token(model, length, causal=True)
    assert causal == pytest.approx(megatron + vectors - saved, rel=1e-12)
    # The model card's draft: 5.7e22 for the run, which counts neither attention nor embedding.
    assert 6 * flops.parameters(model).non_embedding * 150_000 * 3_145_728 == pytest.approx(5.7e22, rel=0.02)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_memory_to_run_the_20b_model():
    model = load_config("neox-20b").model
    # The released slim fp16 files take 41,112,854,242 bytes, container overhead included.
    assert 0 < 41_112_854_242 - planning.weight_bytes(model, "fp16") < 5e6
    assert 20.5e9 < planning.weight_bytes(model, "int8") < 20.9e9
    assert planning.weight_bytes(model, "int4") == pytest.approx(11.2e9, rel=0.01)
    assert planning.kv_bytes_per_token(model) == pytest.approx(1.08e6, rel=0.01)
    assert planning.kv_bytes_per_token(model, 4) == 2 * 44 * 6144 * 4


def stored_bytes(parameters, kind):
    """Bytes of Hugging Face's tensors, one by one."""
    expected = 0
    for key, weight in parameters:
        head = "lm_head" in key or "embed_out" in key
        linear = weight.ndim == 2 and not any(part in key for part in ("embed_in", ".wte.", ".wpe."))
        if not kind.startswith("int"):
            expected += weight.numel() * (4 if kind == "fp32" else 2)
        elif not linear:
            expected += 2 * weight.numel()
        elif kind == "int8" or head:
            expected += weight.numel() + 4 * weight.shape[0]
        else:
            expected += weight.numel() // 2 + 2 * weight.shape[0] * math.ceil(weight.shape[1] / 128)
    return expected


def test_weight_bytes_of_every_kind_tensor_by_tensor():
    for name in ("pythia-70m", "gpt-j-6b", "gpt-neo-125m", "neox-125m"):
        model = load_config(name).model
        parameters = list(hugging_face(model).named_parameters())
        for kind in KINDS:
            assert planning.weight_bytes(model, kind) == stored_bytes(parameters, kind), (name, kind)


def test_training_memory_is_16_bytes_per_parameter():
    config = load_config("pythia-160m")
    memory = one_device(config)
    assert sum(memory[kind] for kind in STATE) == 16 * PUBLISHED["pythia-160m"][0]
    muon = one_device(load_config("pythia-160m", overrides=["optim.name=muon"]))
    assert memory["optimizer"] - muon["optimizer"] == 4 * 12 * 12 * 768**2  # one fp32 moment less: 12 C^2 per layer
    chunk = config.train.loss_chunk
    assert logits_bytes(config, 10**6) == 4 * chunk * 50304
    assert logits_bytes(config, chunk - 1) == 4 * (chunk - 1) * 50304
    # bf16 products, their fp32 copy, and its gradient in bf16 again
    bf16 = load_config("pythia-160m", overrides=["train.dtype=bf16"])
    assert logits_bytes(bf16, 10**6) == (2 + 4 + 2) * chunk * 50304
    sharded = load_config("pythia-160m", overrides=["parallel.dp_shard=4", "parallel.zero=3"])
    assert one_device(sharded) == memory  # whatever the layout


@pytest.mark.parametrize("parallel", [True, False])
def test_activation_memory_is_near_what_autograd_keeps(parallel, monkeypatch):
    """Within 10 % of the storage that our model holds for its backward pass, and less than transformers' holds."""
    torch = pytest.importorskip("torch")
    from neox.model.decoder import GPTNeoX

    width, layers, batch, length = 256, 3, 2, 128
    model = ModelConfig(
        vocab_size=96, hidden_size=width, num_hidden_layers=layers, use_parallel_residual=parallel, rotary_pct=0.25
    )

    hooks = torch.autograd.graph.saved_tensors_hooks

    def kept(network, **options):
        weights = {weight.untyped_storage().data_ptr() for weight in network.parameters()}
        storages = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage  # held, so that no address is used twice
            return tensor

        # The model's own hooks hide these from what they wrap, so what they let through is counted there.
        def counting(pack, unpack):
            return hooks(lambda t: keep(p) if isinstance(p := pack(t), torch.Tensor) else p, unpack)

        monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", counting)
        with hooks(keep, lambda tensor: tensor):
            network(torch.zeros(batch, length, dtype=torch.long), **options)
        return sum(storage.nbytes() for storage in storages.values())

    measured = kept(GPTNeoX(model).initialize(), head=False)
    config = Config(model=model, train={"micro_batch_size": batch}, data={"seq_length": length})
    assert one_device(config)["activations"] == pytest.approx(measured, rel=0.1)
    theirs = hugging_face(model, attn_implementation="sdpa").to_empty(device="cpu").train()
    assert measured < kept(theirs, use_cache=False)


# --- show ------------------------------------------------------------------------------------------------------------


def test_show_prints_config_costs_and_notes_of_every_preset():
    for name in presets.names():
        config = load_config(name)
        text = planning.show(config)
        assert max(map(len, text.splitlines())) <= 100, name
        assert f"{flops.parameters(config.model).total:,}" in text, name
        flat = " ".join(text.split())
        assert all(" ".join(note.split()) in flat for note in presets.notes(name)), name
        assert f"lr={config.optim.lr}" in text, name


def test_table_lists_every_preset_with_its_size():
    lines = {line.split()[0]: line.split()[1] for line in planning.table().splitlines()[1:]}
    assert set(lines) == set(presets.names())
    assert {name: lines[name] for name in PUBLISHED} == {name: f"{total:,}" for name, (total, _) in PUBLISHED.items()}
