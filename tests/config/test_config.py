"""Options: types, precedence, overrides, one-line errors, and the TOML round trip."""

import contextlib
import itertools
import math
import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neox.config import Config, ConfigError, ModelConfig, OptimConfig, load_config
from neox.config.options import SECTIONS

FIELDS = [(section, key, field) for section, cls in SECTIONS.items() for key, field in cls.model_fields.items()]


def kind(field) -> type | None:
    """int, float, bool or str where the field holds a plain one of them, else None."""
    plain = [t for t in (typing.get_args(field.annotation) or [field.annotation]) if t is not type(None)]
    return plain[0] if len(plain) == 1 and plain[0] in (int, float, bool, str) else None


def error_of(**arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(**arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def toml(tmp_path):
    def write(text: str, name: str = "run.toml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


# --- types -----------------------------------------------------------------------------------------------------------


WRONG = {
    int: ["3", True, 1.5, 2.0, [1]],
    float: ["0.5", True, math.nan, math.inf, [0.5]],
    bool: [1, 0, "true", "yes"],
    str: [3, True, 1.5],
}


def test_option_types_are_strict():
    for section, key, field in FIELDS:
        for value in WRONG.get(kind(field), [object(), 3.7, {"a": {}}]):
            with pytest.raises(ConfigError) as caught:
                pytest.fail(f"{section}.{key} took {SECTIONS[section](**{key: value})}")
            assert str(caught.value).startswith(f"{section}.{key}"), (section, key, value)
            assert "\n" not in str(caught.value), (section, key, value)


def test_an_int_is_accepted_for_a_float_option_and_becomes_one():
    for section, key, _ in (one for one in FIELDS if kind(one[2]) is float):
        accepted = []
        for value in (0, 1):  # some floats exclude 0, others 1
            with contextlib.suppress(ConfigError):
                accepted.append(getattr(SECTIONS[section](**{key: value}), key))
        assert accepted, (section, key)
        assert all(type(value) is float for value in accepted), (section, key)


def test_sections_are_frozen_and_hashable():
    config = load_config("pythia-14m")
    with pytest.raises(ValueError):
        config.train.steps = 3
    with pytest.raises(ValueError):
        config.train = config.train
    assert hash(config) == hash(load_config("pythia-14m"))


def test_names_are_those_of_hugging_face():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPTNeoXConfig().to_dict()
    shared = {
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "hidden_act",
        "max_position_embeddings",
        "layer_norm_eps",
        "use_parallel_residual",
        "tie_word_embeddings",
        "initializer_range",
        "model_type",
    }
    assert shared <= set(theirs)
    assert shared <= set(ModelConfig.model_fields)


# --- derived values --------------------------------------------------------------------------------------------------


@given(head_dim=st.integers(1, 256), heads=st.integers(1, 16), pct=st.floats(0, 1))
def test_derived_sizes(head_dim, heads, pct):
    rotated = math.floor(head_dim * pct)
    shape = {"hidden_size": head_dim * heads, "num_attention_heads": heads, "rotary_pct": pct}
    if rotated % 2:
        with pytest.raises(ConfigError, match=r"model\.rotary_pct: .* must be even"):
            ModelConfig(**shape)
        return
    model = ModelConfig(**shape)
    assert (model.head_dim, model.rotary_dim, model.ffn_size) == (head_dim, rotated, 4 * head_dim * heads)
    assert model.softmax_scale == pytest.approx(1 / math.sqrt(head_dim), rel=1e-15)
    assert ModelConfig(**shape, position_embedding="learned").rotary_dim == 0
    assert ModelConfig(**shape, intermediate_size=7).ffn_size == 7
    assert ModelConfig(**shape, attention_scale=1.0).softmax_scale == 1.0


# --- precedence ------------------------------------------------------------------------------------------------------

SOURCES = {"preset": 6e-4, "first file": 7e-4, "second file": 8e-4, "first override": 9e-4, "second override": 2e-3}


def test_precedence_of_sources_the_later_wins(toml):
    files = {s: toml(f"[optim]\nlr = {SOURCES[s]}", f"{s}.toml") for s in ("first file", "second file")}
    for present in (s for n in range(6) for s in itertools.combinations(SOURCES, n)):
        config = load_config(
            preset="pythia-160m" if "preset" in present else None,
            files=[file for s, file in files.items() if s in present],
            overrides=[f"optim.lr={SOURCES[s]}" for s in ("first override", "second override") if s in present],
        )
        assert config.optim.lr == (SOURCES[present[-1]] if present else OptimConfig().lr), present
        assert config.preset == ("pythia-160m" if "preset" in present else None), present


def test_a_file_touches_only_the_keys_it_names(toml):
    config = load_config("pythia-70m", [toml("[optim]\nclip = 0.5")])
    assert config.optim == load_config("pythia-70m").optim.model_copy(update={"clip": 0.5})
    assert config.model == load_config("pythia-70m").model


def test_who_names_the_preset(toml):
    file = toml('preset = "pythia-14m"')
    assert load_config(files=[file]).preset == "pythia-14m"
    assert load_config("pythia-31m", files=[file]).preset == "pythia-31m"
    assert load_config("pythia-31m", files=[file], overrides=["preset=pythia-70m"]).model.hidden_size == 512
    assert load_config(overrides=["preset=neox-20b"]) == load_config("neox-20b")
    assert load_config("pythia-14m", overrides=["preset=none"]) == Config()


# --- overrides -------------------------------------------------------------------------------------------------------


OVERRIDES = [
    ("train.steps=10", "train", "steps", 10),
    ("steps = 10", "train", "steps", 10),
    ("lr=1e-3", "optim", "lr", 1e-3),
    ("lr=1", "optim", "lr", 1.0),
    ("append_eod=false", "data", "append_eod", False),
    ("betas=[0.8, 0.99]", "optim", "betas", (0.8, 0.99)),
    ('data.train=["a", "b=c"]', "data", "train", ("a", "b=c")),
    ("train=corpus", "data", "train", ("corpus",)),
    ("valid=[]", "data", "valid", ()),
    ("data.valid=2024", "data", "valid", ("2024",)),
    ("local_layers=[1, 3]", "model", "local_layers", (1, 3)),
    ("out=runs/a=b", "log", "out", "runs/a=b"),
    ("out=2024-01-01", "log", "out", "2024-01-01"),
    ("out=7", "log", "out", "7"),
    ('out="7 8"', "log", "out", "7 8"),
    ("text_key=true", "data", "text_key", "true"),
    ("tokenizer.path=none", "tokenizer", "path", None),
    ("intermediate_size=none", "model", "intermediate_size", None),
    ("dtype=bf16", "train", "dtype", "bf16"),
    ('logit_bias={" the" = -100, 262 = 5}', "generate", "logit_bias", ((" the", -100.0), ("262", 5.0))),
]


def test_override_values():
    for text, section, key, value in OVERRIDES:
        got = getattr(getattr(load_config(overrides=["model.local_window=4", text]), section), key)
        assert got == value, text
        assert type(got) is type(value), text


def test_bare_keys():
    owners = {}
    for section, key, _ in FIELDS:
        owners.setdefault(key, []).append(section)
    assert {key for key, sections in owners.items() if len(sections) > 1} == {"name", "vocab_size", "seed", "every"}
    for key, sections in owners.items():
        if key == "schedule":  # a section, and an option of another
            assert "write schedule.name= for the learning rate, or parallel.schedule=" in error_of(
                overrides=[f"{key}=1"]
            )
        elif len(sections) > 1:
            message = error_of(overrides=[f"{key}=1"])
            assert all(f"{section}.{key}=" in message for section in sections)
        else:
            value = getattr(getattr(Config(), sections[0]), key)
            text = {True: "true", False: "false"}.get(value, value) if isinstance(value, bool) else value
            text = "none" if text is None else list(text) if isinstance(text, tuple) else text
            assert load_config(overrides=[f"{key}={text}"]) == Config()


KEYS = [f"{section}.{key}" for section, key, _ in FIELDS] + [key for _, key, _ in FIELDS] + ["preset", "train", ""]


@settings(max_examples=300, deadline=None)
@given(
    key=st.sampled_from(KEYS) | st.text(max_size=12),
    value=st.text(max_size=20) | st.integers() | st.floats() | st.sampled_from(["[1,", "{a=1}", "[[", "9" * 5000]),
)
def test_any_override_gives_a_config_or_one_line(key, value):
    message = ""
    try:
        assert isinstance(load_config("pythia-14m", overrides=[f"{key}={value}"]), Config)
    except ConfigError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 6000


# --- errors say what, where, and what else ---------------------------------------------------------------------------


OVERRIDE_ERRORS = [
    ("lrr=1", "lrr: no such key; did you mean optim.lr?"),
    ("train.step=1", "train.step: no such key; did you mean train.steps?"),
    ("train.lr=1", "train.lr: no such key; did you mean optim.lr?"),
    ("every=5", "every: is in several sections, write checkpoint.every= or log.every= or eval.every="),
    ("steps", "expected key=value"),
    ("=3", "expected key=value"),
    ("train.steps=0", "train.steps: must be greater than 0, got 0 (from train.steps=0)"),
    ("train.steps='3'", "train.steps: must be a valid integer, got '3'"),
    ("global_batch_size=-1", "train.global_batch_size: must be greater than 0"),
    ("micro_batch_size=0", "train.micro_batch_size: must be greater than 0"),
    ("model.vocab_size=0", "model.vocab_size: must be greater than 0"),
    ("betas=[0.9, 1.0]", "optim.betas[1]: must be less than 1, got 1.0"),
    ("betas=[0.9]", "optim.betas[1]: is missing"),
    ("dtype=fp8", "train.dtype: must be 'fp32', 'bf16' or 'fp16', got 'fp8'"),
    ("top_p=0", "generate.top_p: must be greater than 0"),
    ("stop_tokens=[-1]", "generate.stop_tokens[0]: must be greater than or equal to 0, got -1"),
    ("logit_bias=x", 'generate.logit_bias: must be a table such as {" the" = -100, 262 = 5} (from logit_bias=x)'),
    ("logit_bias={a = 101}", "generate.logit_bias[0][1]: must be less than or equal to 100, got 101"),
    ("out=", "log.out: must have at least 1 character"),
    ("data.train=[a, b]", "not a list; its texts need quotes"),
    ("hidden_size=130", "model.hidden_size: 130 does not split into 4 heads (from hidden_size=130)"),
    ("rotary_pct=0.1", "model.rotary_pct: 0.1 of 32 dims per head rotates 3, which must be even"),
    ("local_layers=[6]", "model.local_layers: no layer 6, they are 0 to 5"),
    ("local_layers=[1]", "model.local_window: must be at least 1 where local_layers are given"),
    ("local_layers=[1, 1]", "model.local_layers: names a layer twice"),
    ("seq_length=4096", "data.seq_length: 4096 is more than model.max_position_embeddings (2048)"),
    ("loss_scale=0.5", "optim.loss_scale: must be greater than or equal to 1, got 0.5 (from loss_scale=0.5)"),
    ("loss_scale_min=8192", "optim.loss_scale_min: 8192.0 is above loss_scale (4096.0)"),
    ("hidden_dropout=1", "model.hidden_dropout: must be less than 1"),
    ("warmup=143001", "schedule.warmup: 143001 updates are more than the 143000 of train.steps"),
    ("min_lr=0.01", "schedule.min_lr: 0.01 is above optim.lr (0.001)"),
    ("preset=pythia-160", "no preset 'pythia-160'; did you mean pythia-160m?"),
]


def test_override_errors():
    for override, expected in OVERRIDE_ERRORS:
        assert expected in error_of(preset="pythia-14m", overrides=[override]), override


SCHEDULE_ERRORS = [
    (("warmup=20", "horizon=10"), "schedule.warmup: 20 updates are more than the 10 of schedule.horizon"),
    (("warmup=600", "schedule.name=wsd", "decay=0.5", "steps=1000"), "schedule.decay: 500 updates after 600 of"),
    (("warmup=0", "schedule.name=inverse_sqrt"), "schedule.warmup: inverse_sqrt decays by its length"),
]


def test_schedules_that_do_not_fit_their_horizon():
    for overrides, expected in SCHEDULE_ERRORS:
        assert expected in error_of(overrides=overrides), overrides


TOML_ERRORS = [
    ("[train]\n# so many\nstepz = 3", 3, "train.stepz: no such key; did you mean train.steps?"),
    ("[train]\nsteps = '3'", 2, "train.steps: must be a valid integer, got '3'"),
    ("train.steps = true", 1, "train.steps: must be a valid integer, got True"),
    ("\n[trian]\nsteps = 3", 2, "trian: no such section; did you mean train?"),
    ("lr = 3", 1, "lr: no such section; did you mean optim.lr?"),
    ("train = 3", 1, "train: is a section, write [train]"),
    ("[optim]\nbetas = [\n 0.9,\n 1.5,\n]", 2, "optim.betas[1]: must be less than 1, got 1.5"),
    ("[data]\nseq_length = 4096", 2, "data.seq_length: 4096 is more than"),
    ("[model]\nhidden_size = 130", 2, "model.hidden_size: 130 does not split into 4 heads"),
    ("preset = 'neox-21b'", 1, "no preset 'neox-21b'; did you mean neox-20b?"),
    ("preset = 3", 1, "preset: must be a name, got 3"),
    ("[train]\nsteps = = 3", 2, "not valid TOML"),
    ("[train]\nsteps = 3\nsteps = 4\n", 3, "not valid TOML"),
]


def test_toml_errors_name_the_line(toml):
    for text, line, expected in TOML_ERRORS:
        path = toml(text)
        message = error_of(files=[path])
        assert expected in message, text
        assert f"{path}:{line}" in message, text


def test_files_that_cannot_be_read(tmp_path):
    assert error_of(files=[tmp_path / "none.toml"]) == f"{tmp_path / 'none.toml'}: no such file"
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as text" in error_of(files=[tmp_path / "binary.toml"])
    assert "cannot be read" in error_of(files=[tmp_path])


def test_sections_made_in_python_complain_in_one_line_too():
    with pytest.raises(ConfigError, match=r"^model\.hidden_sizes: no such key; did you mean model\.hidden_size\?$"):
        ModelConfig(hidden_sizes=3)
    with pytest.raises(ConfigError, match=r"^model\.hidden_size: must be a valid integer, got '3'$"):
        Config(model={"hidden_size": "3"})
    with pytest.raises(ConfigError, match=r"\(and 1 more\)$"):
        ModelConfig(hidden_size="3", num_hidden_layers=-1)
    with pytest.raises(ConfigError, match=r"^model\.shared_layer_norm: needs use_parallel_residual"):
        ModelConfig(shared_layer_norm=True, use_parallel_residual=False)


# --- round trip ------------------------------------------------------------------------------------------------------

positive = st.integers(1, 10**9)
not_negative = st.integers(0, 10**9)
unit = st.floats(0, 1, exclude_max=True)
rate = st.floats(1e-12, 10)
words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
BOUNDED = {"repetition_penalty": st.floats(0.01, 100), "rope_factor": st.floats(1, 64)}
VALUES = {
    int: positive,
    float: st.floats(1e-6, 0.5),
    bool: st.booleans(),
    str: words,
}


@st.composite
def configs(draw) -> Config:
    """Any values of the right kind, made consistent where options depend on each other."""
    sections: dict[str, dict] = {}
    for section, key, field in FIELDS:
        choices = typing.get_args(field.annotation)
        if kind(field):
            value = BOUNDED[key] if key in BOUNDED else VALUES[kind(field)]
            if type(None) in choices:
                value = st.none() | value
        elif key == "betas":
            value = st.tuples(unit, unit)
        elif key in ("local_layers", "weights", "stage_layers", "json_schema", "regex", "grammar"):
            continue
        elif key == "logit_bias":
            value = st.dictionaries(words, st.floats(-100, 100), max_size=3)
        elif key == "batch_warmup":
            value = st.lists(st.tuples(positive, positive), max_size=3)
        elif key == "stop_tokens":
            value = st.lists(not_negative, max_size=3)
        elif choices[-1] is Ellipsis:
            value = st.lists(words, max_size=3)
        else:
            value = st.sampled_from([v for c in choices if c is not type(None) for v in typing.get_args(c) or [c]])
            value = st.none() | value if type(None) in choices else value
        sections.setdefault(section, {})[key] = draw(value)
    model = sections["model"]
    heads, layers = draw(st.integers(1, 8)), draw(st.integers(1, 12))
    model |= {"num_attention_heads": heads, "hidden_size": 8 * heads, "rotary_pct": draw(st.sampled_from([0.25, 0.5]))}
    model |= {"num_hidden_layers": layers, "shared_layer_norm": False}
    if model["position_embedding"] == "learned" or model["rope_scaling"] == "dynamic":
        model["rope_scaling"] = "none"
    model["local_layers"] = draw(st.lists(st.integers(0, layers - 1), unique=True))
    tp, cp = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    model |= {key: tp * draw(st.integers(1, 8)) for key in ("num_attention_heads", "vocab_size", "intermediate_size")}
    model["hidden_size"] = 8 * model["num_attention_heads"]
    model["mup_base_width"] = draw(st.none() | st.integers(1, 8).map(lambda heads: 8 * heads))
    sections["parallel"] |= {"tp": tp, "cp": cp, "sequence_parallel": tp > 1 and draw(st.booleans())}
    parallel = sections["parallel"]
    parallel |= {"pp": 1, "schedule": draw(st.sampled_from(["1f1b", "interleaved_1f1b"]))}
    if draw(st.booleans()) and layers % 2 == 0:
        stages = 2 if parallel["schedule"] == "1f1b" else layers
        parallel |= {"pp": 2, "zero": 1, "stages_per_rank": stages // 2}
        parallel["stage_layers"] = draw(st.sampled_from([[], [layers // stages] * stages]))
        model["tie_word_embeddings"] = False
    data = sections["data"]
    data["seq_length"] = 2 * cp * tp * draw(st.integers(1, 10**7))
    entries = len(data["train"])
    data["weights"] = draw(st.just([]) | st.lists(st.floats(1e-6, 1e6), min_size=entries, max_size=entries))
    if data["order"] == "preshuffled":
        data["weights"] = []
    if data["weights"] or data["order"] == "preshuffled":
        data["weigh"] = "given"
    data["split"] = draw(st.sampled_from([None, "995,4,1", "9/1"]))
    data["valid"] = [] if data["split"] else data["valid"]
    model["max_position_embeddings"] = max(data["seq_length"], model["max_position_embeddings"])
    sections["schedule"]["min_lr"] = sections["optim"]["lr"] * draw(unit)
    sections["train"]["profile_step"] = draw(st.integers(0, sections["train"]["steps"]))
    sections["optim"]["loss_scale"] = draw(st.floats(1, 2**24))
    return Config(preset=draw(st.none() | st.sampled_from(["neox-20b", "gpt-neo-125m", "pythia-14m"])), **sections)


@settings(max_examples=150, deadline=None)
@given(config=configs())
def test_to_toml_is_accepted_back_verbatim(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("toml") / "config.toml"
    path.write_text(config.to_toml(), encoding="utf-8", newline="")
    again = load_config(files=[path])
    assert again == config
    assert again.to_toml() == config.to_toml()


def test_to_toml_is_complete():
    import tomllib

    table = tomllib.loads(load_config("gpt-neo-125m").to_toml())
    assert table.pop("preset") == "gpt-neo-125m"
    assert {(s, k) for s, keys in table.items() for k in keys} == {(s, k) for s, k, _ in FIELDS}
