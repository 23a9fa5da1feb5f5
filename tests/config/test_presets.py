"""The table of presets against the published record and the defaults of Hugging Face's configs."""

import math

import pytest

from neox.config import load_config, presets

PYTHIA = {  # size: TP ranks of the original run, peak lr in the config that was run (pythia, models/*)
    "14m": (1, 1e-3),
    "31m": (1, 1e-3),
    "70m": (1, 1e-3),
    "160m": (1, 6e-4),
    "410m": (1, 3e-4),
    "1b": (1, 2.5e-4),
    "1.4b": (1, 2e-4),
    "2.8b": (1, 1.6e-4),
    "6.9b": (2, 1.2e-4),
    "12b": (4, 1.2e-4),
}
GPT = ("19m", "49m", "125m", "350m", "760m", "800m", "1.3b", "2.7b", "6.7b", "13b", "175b")
GPT_NEO = ("125m", "1.3b", "2.7b")
TOKENS_20B_TOKENIZER = 50277


def test_names():
    assert set(presets.names()) == {
        "quickstart",
        "neox-20b",
        "gpt-j-6b",
        *(f"pythia-{size}" for size in PYTHIA),
        *(f"neox-{size}" for size in GPT),
        *(f"gpt-neo-{size}" for size in GPT_NEO),
    }
    assert len(set(presets.names())) == len(presets.ROWS)


def test_every_preset_is_a_config_with_notes():
    for name in presets.names():
        config, notes = load_config(name), presets.notes(name)
        length = 256 if name == "quickstart" else 2048
        assert config.preset == name
        assert (config.data.seq_length, config.model.max_position_embeddings) == (length, length), name
        assert config.train.dtype == "fp32", name
        assert notes, name
        assert all(note.endswith(".") and "\n" not in note and ":" in note for note in notes), name


def test_a_preset_is_a_fresh_copy():
    presets.preset("pythia-14m")["optim"]["betas"].clear()
    presets.preset("pythia-14m")["model"]["vocab_size"] = 3
    assert presets.preset("pythia-14m")["optim"]["betas"] == [0.9, 0.95]
    assert load_config("pythia-14m").model.vocab_size == 50304


def test_unknown_names():
    for wrong, hint in (
        ("pythia-160", "did you mean pythia-160m?"),
        ("neox20b", "did you mean neox-20b?"),
        ("xyz", "`neox show` lists them"),
    ):
        for function in (presets.preset, presets.notes):
            with pytest.raises(ValueError, match="^no preset ") as caught:
                function(wrong)
            assert hint in str(caught.value), wrong


def test_presets_that_gpt_neox_1_trained_have_its_schedule():
    for name in presets.names():
        before = name == "neox-20b" or name.startswith("pythia-")
        assert load_config(name).schedule.name == ("cosine_floored" if before else "cosine"), name
        assert before == ("cosine_floored" in " ".join(presets.notes(name))), name


def test_pythia_recipe():
    for size in PYTHIA:
        config, (tensor_parallel, lr) = load_config(f"pythia-{size}"), PYTHIA[size]
        multiple = 128 * tensor_parallel
        assert config.model.vocab_size == math.ceil(TOKENS_20B_TOKENIZER / multiple) * multiple, size
        assert config.train.steps * config.train.global_batch_size * config.data.seq_length == 299_892_736_000, size
        assert config.optim.lr == lr, size
        assert config.schedule.min_lr == pytest.approx(lr / 10, rel=1e-12), size
        assert config.schedule.warmup * config.train.steps == pytest.approx(1430), size
        assert (config.optim.betas, config.optim.weight_decay, config.optim.clip) == ((0.9, 0.95), 0.1, 1.0), size
        assert (config.model.use_parallel_residual, config.model.rotary_pct) == (True, 0.25), size
        assert config.model.hidden_act == "gelu", size
        assert (config.model.init_method == "normal") == (size in ("6.9b", "12b")), size


def test_20b_recipe():
    config = load_config("neox-20b")
    assert config.model.rotary_dim == 24
    assert config.train.global_batch_size == 4 * 32 * (96 // (2 * 4))
    assert config.train.global_batch_size * config.data.seq_length == 3_145_728
    assert config.train.steps * config.schedule.warmup == 1500
    assert (config.optim.lr, config.schedule.min_lr, config.optim.weight_decay) == (0.97e-4, 0.97e-5, 0.01)
    assert (config.model.hidden_act, config.model.init_method) == ("gelu_fast", "small_init")
    assert config.model.vocab_size == math.ceil(TOKENS_20B_TOKENIZER / 256) * 256


def test_gpt_recipes():
    for size in GPT:
        config = load_config(f"neox-{size}")
        assert config.model.use_parallel_residual == (size == "49m"), size
        assert config.model.rotary_pct == (0.25 if size == "49m" else 1.0), size
        assert config.optim.betas == ((0.9, 0.999) if size == "760m" else (0.9, 0.95)), size
        assert config.train.steps == (143_000 if size in ("19m", "49m", "800m") else 320_000), size
        assert config.schedule.min_lr == pytest.approx(config.optim.lr / 10, rel=1e-12), size


@pytest.mark.parametrize(
    ("name", "theirs"), [("neox-20b", "GPTNeoXConfig"), ("gpt-j-6b", "GPTJConfig"), ("gpt-neo-1.3b", "GPTNeoConfig")]
)
def test_shape_is_the_default_of_hugging_face(name, theirs):
    """Each of these classes has one released model's shape as its defaults."""
    transformers = pytest.importorskip("transformers")
    config, model = getattr(transformers, theirs)(), load_config(name).model
    assert model.model_type == config.model_type
    assert model.vocab_size == config.vocab_size
    assert model.hidden_size == config.hidden_size
    assert model.num_hidden_layers == config.num_hidden_layers
    assert model.num_attention_heads == config.num_attention_heads
    assert model.max_position_embeddings == config.max_position_embeddings
    if name == "gpt-j-6b":
        assert model.rotary_dim == config.rotary_dim
        assert model.hidden_act == config.activation_function
    if name == "gpt-neo-1.3b":
        assert model.local_window == config.window_size
        assert [n in model.local_layers for n in range(24)] == [kind == "local" for kind in config.attention_layers]
        assert model.hidden_act == config.activation_function
    if name == "neox-20b":
        assert model.ffn_size == config.intermediate_size


def test_contradictions_of_the_record_are_in_the_notes():
    for name, words in (
        ("neox-20b", ["0.97e-4", "0.97e-5", "1536", "1538", "50257", "50277", "50432", "fp16"]),
        ("pythia-160m", ["tanh", "erf", "fp16"]),
        ("pythia-1b", ["2.5e-4", "3.0e-4", "tanh", "bf16"]),
        ("pythia-12b", ["erratum", "#135", "normal", "tanh"]),
        ("neox-125m", ["global_batch_size", "2^16"]),
        ("pythia-14m", ["stage 0", "hysteresis"]),
        ("gpt-j-6b", ["not recorded here"]),
        ("gpt-neo-2.7b", ["not recorded here"]),
    ):
        text = " ".join(presets.notes(name))
        assert [word for word in words if word not in text] == [], name


def test_an_unrecorded_recipe_is_not_invented():
    defaults = load_config()
    for name in ("gpt-j-6b", *(f"gpt-neo-{size}" for size in GPT_NEO)):
        for section in ("train", "optim", "schedule"):
            assert getattr(load_config(name), section) == getattr(defaults, section), (name, section)


def test_loss_scales_are_those_that_the_models_were_trained_with():
    """2^12 where gpt-neox's configs say so, else DeepSpeed's 2^16; no hysteresis under ZeRO stage 0."""
    for name in presets.names():
        optim = load_config(name).optim
        left_out = name.startswith("neox-") and name not in ("neox-20b", "neox-19m", "neox-49m", "neox-800m")
        assert optim.loss_scale == (65536 if left_out else 4096), name
        assert optim.loss_scale_hysteresis == (1 if name in ("pythia-14m", "pythia-31m") else 2), name
