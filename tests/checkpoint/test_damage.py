"""Checkpoints that cannot be used: one line with the file and the fault, and nothing in them is executed."""

import json
import os
import pickle
import shutil
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import neox
from neox.checkpoint import CheckpointError, families, save_step
from neox.config import Config, ModelConfig
from neox.model.decoder import GPTNeoX
from tests.checkpoint import released
from tests.checkpoint.sealing import seal
from tests.tiny import GPT_J, ours, rewrite_config, theirs, tokens

SHARD = "model-00002-of-00005.safetensors"  # the first of three layers


def refused(folder) -> str:
    """Error line of loading the folder."""
    with pytest.raises(CheckpointError) as caught:
        neox.load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def model(tmp_path, tokenizer):
    """Pythia's files, sharded."""
    return released.write(tmp_path / "model", released.CONFIG_PYTHIA, released.state(3), "sharded", tokenizer)


@pytest.fixture
def change(model):
    """Change the tensors of one shard, and the index with them."""

    def apply(edit) -> None:
        tensors = load_file(model / SHARD)
        edit(tensors)
        save_file(tensors, model / SHARD)
        index = json.loads((model / "model.safetensors.index.json").read_text())
        kept = {name: file for name, file in index["weight_map"].items() if file != SHARD}
        index["weight_map"] = kept | dict.fromkeys(tensors, SHARD)
        (model / "model.safetensors.index.json").write_text(json.dumps(index))

    return apply


NAME = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"


def test_a_missing_tensor(model, change):
    change(lambda tensors: [tensors.pop(NAME), tensors.pop(NAME.replace("weight", "bias"))])
    message = refused(model)
    assert NAME.replace("weight", "bias") in message
    assert "is missing (and 1 more)" in message


def test_a_tensor_too_many(model, change):
    change(lambda tensors: tensors.update({"gpt_neox.layers.0.attention.adapter.weight": torch.ones(2)}))
    assert "tensor gpt_neox.layers.0.attention.adapter.weight is not part of this model" in refused(model)


def test_a_layer_too_many_or_too_few(model):
    rewrite_config(model, num_hidden_layers=2)
    assert "layers.2." in refused(model)
    rewrite_config(model, num_hidden_layers=4)
    assert "layers.3." in refused(model)


def test_a_misshapen_tensor(model, change):
    for shape in ((128, 31), (32, 128), (128,), (), (128, 32, 1), (0, 32)):
        change(lambda tensors, shape=shape: tensors.update({NAME: torch.ones(shape)}))
        message = refused(model)
        assert f"{SHARD}: tensor {NAME} has shape {list(shape)}, config.json says [128, 32]" in message


def test_misshapen_q_k_v_whose_rows_add_up(tmp_path):
    neox.save(ours(**GPT_J), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    for which, rows in (("k", 16), ("q", 48)):
        tensors[f"transformer.h.0.attn.{which}_proj.weight"] = torch.ones(rows, 32)
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    assert "q_proj.weight has shape [48, 32], config.json says [32, 32]" in refused(tmp_path / "model")


def test_a_missing_shard(model):
    (model / SHARD).unlink()
    assert f"1 shard(s) missing, the first is {SHARD}" in refused(model)


def test_a_shard_without_what_the_index_says(model):
    tensors = load_file(model / SHARD)
    del tensors[NAME]
    save_file(tensors, model / SHARD)
    assert SHARD in refused(model)


def test_an_index_that_does_not_name_files_of_the_folder(model):
    for table in (None, [], {"a": 3}, {"a": "../../secret"}, {"a": "/etc/passwd"}, {"a": ""}):
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
        assert "model.safetensors.index.json: its weight_map does not name files" in refused(model), table


def test_no_weights_no_folder_and_a_file(model):
    for file in model.glob("model*"):
        file.unlink()
    assert "no model.safetensors" in refused(model)
    assert "is a file" in refused(model / "config.json")
    assert "no such folder" in refused(model / "nowhere")
    (model / "config.json").unlink()
    assert "neither a Hugging Face folder (config.json) nor a run" in refused(model)


@pytest.mark.parametrize("error", [OSError("no route\nto host"), RuntimeError(), ValueError("bad id")])
def test_a_hub_that_cannot_be_reached(monkeypatch, error):
    def unreachable(name, revision, allow_patterns):
        assert (name, revision) == ("EleutherAI/pythia-70m", "step3000")
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    reason = str(error).partition("\n")[0] or "RuntimeError"
    message = refused("EleutherAI/pythia-70m@step3000")
    assert message.startswith(f"EleutherAI/pythia-70m@step3000: cannot be fetched from the hub ({reason})")
    for no_id in ("nowhere", "a/b/c", "../b", "/a/b", "~/b"):
        assert "no such folder" in refused(no_id)


def run_directory(folder):
    """A run with one complete step: its folder."""
    network = GPTNeoX(ModelConfig(vocab_size=97, hidden_size=32, num_attention_heads=2, num_hidden_layers=1))
    config = Config(model=network.config)
    return save_step(folder, [network.initialize()], [], config, {"step": 3, "samples": 48})


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.999))
@pytest.mark.parametrize(
    ("layout", "file"),
    [
        ("single", "model.safetensors"),
        ("single", "config.json"),
        ("single", "tokenizer.json"),
        ("sharded", SHARD),
        ("sharded", "model.safetensors.index.json"),
        ("bin", "pytorch_model.bin"),
        ("bin-legacy", "pytorch_model.bin"),
        ("run", ".metadata"),
        ("run", "state.json"),
        ("run", "__0_0.distcp"),
        ("run", "config.toml"),
        ("run", "checksums.json"),
    ],
)
def test_a_file_truncated_anywhere_is_one_line(tmp_path, tokenizer, layout, file, share):
    folder = tmp_path / layout
    if not folder.exists():
        if layout == "run":
            run_directory(folder)
        else:
            released.write(folder, released.CONFIG_PYTHIA, released.state(3), layout, tokenizer)
    path = folder / ("step_00000003" if layout == "run" else "") / file
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole.rstrip()) * share)])  # without its last line break a JSON file is whole
    try:
        with pytest.raises(ValueError) as caught:
            neox.load(folder)
        assert "\n" not in str(caught.value)
        assert str(path.parent) in str(caught.value)
    finally:
        path.write_bytes(whole)


def test_an_unknown_model_type(model):
    for value in ("mamba", "", None, 3, ["gpt_neox"]):
        rewrite_config(model, model_type=value)
        message = refused(model)
        assert f"config.json: model_type {value!r} is not one that neox runs" in message
        assert "gpt_neox, gptj, gpt_neo" in message


def test_an_unknown_rope_scaling_is_refused(model):
    raw = (model / "config.json").read_bytes()
    spellings = (("rope_scaling", "type"), ("rope_scaling", "rope_type"), ("rope_parameters", "rope_type"))
    for kind, (table, key) in product(("llama3", "longrope", "proportional"), spellings):
        (model / "config.json").write_bytes(raw)
        rewrite_config(model, **{table: {key: kind, "factor": 2.0}})
        message = refused(model)
        assert f"rope_type {kind!r}: neox has default, linear, dynamic and yarn" in message, (table, key)


def test_attention_in_both_directions_is_refused(model):
    """Transformers drops the causal mask then, in a causal model's own class too."""
    rewrite_config(model, is_causal=False)
    assert "is_causal = false asks for attention in both directions" in refused(model)


RAW = {
    "gpt_neox": released.CONFIG_PYTHIA,
    "gptj": theirs("gptj").config.to_dict(),
    "gpt_neo": theirs("gpt_neo").config.to_dict(),
}
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 200) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["rope_type", "type"]), inner),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(sorted(RAW)), data=st.data())
def test_any_value_of_any_key_gives_a_config_or_one_line(kind, data):
    raw = dict(RAW[kind])
    keys = sorted({*raw, "rope_parameters", "rope_scaling"})
    for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=2)):
        if data.draw(st.booleans()):
            raw[key] = data.draw(anything)
        else:
            raw.pop(key, None)
    try:
        assert isinstance(families.read_config(raw), ModelConfig)
    except ValueError as error:
        said = str(error)
    else:
        said = "a config"
    assert said
    assert "\n" not in said


class Malice:
    """Unpickles into a call of os.system."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["value", "whole"])
def test_a_pickle_of_weights_executes_nothing(model, tmp_path, legacy, place):
    for file in model.glob("model*"):
        file.unlink()
    sign = tmp_path / "executed"
    content = Malice(sign) if place == "whole" else {**released.state(3), "embed_out.weight": Malice(sign)}
    torch.save(content, model / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    assert "pytorch_model.bin: " in refused(model)
    assert not sign.exists()
    torch.load(model / "pytorch_model.bin", weights_only=False)
    assert sign.exists()  # the file was a real threat


def test_a_pickle_of_something_else_is_no_weight_file(model):
    for file in model.glob("model*"):
        file.unlink()
    torch.save([torch.ones(2)], model / "pytorch_model.bin")
    assert "holds more than named tensors" in refused(model)


@pytest.mark.parametrize("place", ["whole", "planner_data", "storage_data"])
def test_a_runs_metadata_executes_nothing(tmp_path, place):
    folder, sign = run_directory(tmp_path / "run"), tmp_path / "executed"
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    if place == "whole":
        metadata = Malice(sign)
    else:
        setattr(metadata, place, Malice(sign))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(folder)
    assert f"{folder / '.metadata'}: cannot be read" in refused(tmp_path / "run")
    assert not sign.exists()
    pickle.loads((folder / ".metadata").read_bytes())
    assert sign.exists()


def test_a_runs_tensors_execute_nothing(tmp_path):
    """A .distcp file is unpickled too; its place and size are taken from the metadata."""
    folder, sign = run_directory(tmp_path / "run"), tmp_path / "executed"
    (data,) = folder.glob("*.distcp")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    torch.save(Malice(sign), data)
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, data.stat().st_size
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(folder)
    assert str(folder) in refused(tmp_path / "run")
    assert not sign.exists()


# What a run wrote


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_a_run_directory_and_a_step_folder_load_as_the_model_that_was_trained(tmp_path, tokenizer, tied):
    run = tmp_path / "run"
    shape = {"vocab_size": 384, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = Config(model=ModelConfig(**shape, tie_word_embeddings=tied))
    networks = {}
    for step in (0, 100, 20):
        networks[step] = ours(seed=step, **config.model.model_dump())
        save_step(run, [networks[step]], [], config, {"step": step, "samples": step})
    tokenizer.save(run / "tokenizer.json")
    (run / "step_00000200").mkdir()  # of a writer that was killed: no .metadata
    for source, step in ((run, 100), (run / "step_00000020", 20), (str(run / "step_00000000"), 0)):
        model, own_tokenizer = neox.load(source)
        assert own_tokenizer.sha256 == tokenizer.sha256
        assert not model.training
        assert model.config == config.model
        assert torch.equal(model(tokens()), networks[step](tokens()))
        assert (model.embed_out.weight is model.embed_in.weight) == tied
    assert {p.dtype for p in neox.load(run, dtype="bf16")[0].parameters()} == {torch.bfloat16}
    assert "is not a complete checkpoint" in refused(run / "step_00000200")
    shutil.rmtree(run / "step_00000100")
    assert torch.equal(neox.load(run)[0](tokens()), networks[20](tokens()))


def test_a_step_of_another_model_is_refused(tmp_path):
    folder = run_directory(tmp_path / "run")
    text = (folder / "config.toml").read_text()
    for old, new, complaint in (
        ("num_hidden_layers = 1", "num_hidden_layers = 2", "is missing"),
        ("hidden_size = 32", "hidden_size = 64", "has shape"),
        ("head_bias = false", "head_bias = true", "model.embed_out.bias is missing"),
        ("qkv_bias = true", "qkv_bias = false", "is not part of what this config describes"),
    ):
        assert text.count(old) == 1
        (folder / "config.toml").write_text(text.replace(old, new))
        seal(folder)
        assert complaint in refused(tmp_path / "run")


def test_a_newer_format_is_refused(tmp_path):
    folder = run_directory(tmp_path / "run")
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"format_version": 99}))
    seal(folder)
    assert "format version 99, this neox reads 1: upgrade neox" in refused(tmp_path / "run")
