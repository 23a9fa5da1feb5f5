"""Rotary scaling of each kind against transformers: forward, gradients, the cache, the kernels, files in and out."""

import copy
import json

import pytest
import torch

import neox
from neox.config import ModelConfig
from neox.generate import Engine, Sampling
from neox.model.decoder import GPTNeoX
from neox.quantization.packed import quantize
from tests import tiny

SHAPE = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
ORIGINAL, LONG = 32, 96
YARN = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": ORIGINAL}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "legacy linear": {"type": "linear", "factor": 2.0},
    "other base and share": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": YARN,
    "yarn without a factor": YARN | {"factor": None},
    "yarn, all set": YARN | {"attention_factor": 1.3, "beta_fast": 16, "beta_slow": 2},
    "yarn, original context beside the table": {"rope_type": "yarn", "factor": 3.0},
    "yarn, original context twice": YARN | {"original_max_position_embeddings": LONG},
    "yarn, mscale": YARN | {"mscale": 1.5, "mscale_all_dim": 0.7},
}


def pair(tmp_path, name: str, seed: int = 0):
    """The same weights in transformers and here; both read one config.json."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(seed)
    context = ORIGINAL if name == "dynamic" else LONG
    folder = tmp_path / "model"
    plain = GPTNeoXConfig(**SHAPE, max_position_embeddings=context, rotary_pct=1.0, attn_implementation="eager")
    GPTNeoXForCausalLM(plain).save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    del raw["rope_parameters"]
    key = "rope_scaling" if name.startswith("legacy") else "rope_parameters"
    raw |= {key: SCALINGS[name], "rotary_pct": 1.0, "rotary_emb_base": 10000.0}
    if "original context" in name:
        raw["original_max_position_embeddings"] = ORIGINAL
    (folder / "config.json").write_text(json.dumps(raw))
    theirs = GPTNeoXForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    ours, _ = neox.load(folder)
    assert ours.config.max_position_embeddings == LONG
    return theirs, ours


def ids(length: int, seed: int = 1, rows: int = 2) -> torch.Tensor:
    return torch.randint(SHAPE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SCALINGS)
def test_rope_scaling_gives_the_logits_and_gradients_of_transformers(tmp_path, name):
    """A copy for each length: transformers keeps the longest length that dynamic scaling has met."""
    theirs, ours = pair(tmp_path, name)
    for length in (1, ORIGINAL - 1, ORIGINAL, ORIGINAL + 7, LONG):
        fresh, tokens = copy.deepcopy(theirs), ids(length)
        expected, found = fresh(tokens).logits, ours(tokens)
        assert tiny.relative(found, expected) < 1e-5, length
    expected.square().mean().backward()
    found.square().mean().backward()
    parameter = "layers.0.attention.query_key_value.weight"
    assert tiny.relative(ours.get_parameter(parameter).grad, fresh.get_parameter(f"gpt_neox.{parameter}").grad) < 1e-5
    default = GPTNeoX(ours.config.replace(rope_scaling="none"))
    default.load_state_dict(ours.state_dict())
    assert tiny.relative(default(tokens), expected) > 1e-3, "the scaling does something"


@pytest.mark.parametrize("name", SCALINGS)
def test_generation_with_the_cache_is_that_of_transformers(tmp_path, name):
    """Greedy, from a short prompt across the original context to the end of the long one, packed and unpacked."""
    theirs, ours = pair(tmp_path, name, seed=3)
    prompt = ids(9, rows=1)
    expected = theirs.generate(prompt, max_length=LONG, do_sample=False, eos_token_id=None)[0, 9:].tolist()
    sampling = Sampling(max_tokens=LONG, temperature=0)
    for model in (ours, quantize(copy.deepcopy(ours), "fp32")):
        (done,) = Engine(model, slots=1).generate([prompt[0].tolist()], sampling)
        assert done.tokens == expected


@pytest.mark.parametrize("name", SCALINGS)
def test_rope_scaling_is_exported_and_read_back(tmp_path, name):
    from transformers import AutoModelForCausalLM

    theirs, ours = pair(tmp_path, name)
    neox.save(ours, tmp_path / "out")
    back, _ = neox.load(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager", dtype=torch.float32)
    tokens = ids(LONG)
    assert torch.equal(back(tokens), ours(tokens))
    assert tiny.relative(again.eval()(tokens).logits, theirs(tokens).logits) < 1e-6


def test_a_cached_position_has_the_dynamic_angle_of_its_own_length(tmp_path):
    """Chunks of a prompt, other requests and the prefix cache change nothing."""
    _, ours = pair(tmp_path, "dynamic")
    packed = quantize(ours, "fp32")
    prompts = [ids(70, seed, rows=1)[0].tolist() for seed in range(3)]
    prompts[1][:50] = prompts[0][:50]
    sampling = Sampling(max_tokens=10, temperature=0, logprobs=1)
    alone = [Engine(packed, slots=1).generate([prompt], sampling)[0] for prompt in prompts]
    assert Engine(packed, slots=3, budget=17).generate(prompts, sampling) == alone


def test_rope_scaling_that_cannot_be_is_refused():
    for changes, words in (
        ({"position_embedding": "learned", "rope_scaling": "linear"}, "rope_scaling: 'linear' has no rotary positions"),
        ({"rotary_pct": 0.0, "rope_scaling": "yarn"}, "rope_scaling: 'yarn' has no rotary positions"),
        ({"hidden_size": 32, "num_attention_heads": 4, "rope_scaling": "dynamic"}, "at least 4 rotary dims per head"),
        ({"rope_scaling": "linear", "rope_factor": 0.5}, "rope_factor"),
    ):
        with pytest.raises(ValueError, match=words):
            ModelConfig(**changes)
    assert ModelConfig(rope_scaling="yarn", rope_factor=4, max_position_embeddings=8192).rope_context == 2048
