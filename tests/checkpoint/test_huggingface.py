"""Hugging Face folders: released files load, transformers reads ours, and writing is whole or not at all."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import neox
from neox.checkpoint import families
from neox.checkpoint.export import convert
from neox.config import load_config
from neox.config.presets import names
from neox.tokenizer import Tokenizer
from tests.checkpoint import released
from tests.tiny import ours, read_by_transformers, relative, theirs, tokens

ROOT = Path(__file__).resolve().parents[2]
CASES = [
    pytest.param(released.CONFIG_20B, torch.float16, torch.uint8, "sharded", id="20b-46-shards"),
    pytest.param(released.CONFIG_20B, torch.float16, torch.uint8, "bin-sharded", id="20b-46-bin"),
    pytest.param(released.CONFIG_PYTHIA, torch.float16, torch.bool, "single", id="pythia"),
    pytest.param(released.CONFIG_PYTHIA, torch.float16, torch.uint8, "bin", id="pythia-bin"),
    pytest.param(
        released.CONFIG_PYTHIA | {"torch_dtype": "bfloat16"}, torch.bfloat16, torch.bool, "single", id="pythia-1b"
    ),
    pytest.param(released.CONFIG_PYTHIA, torch.float16, torch.bool, "bin-legacy", id="bin-of-an-old-torch"),
]


@torch.no_grad()
@pytest.mark.parametrize(("config", "dtype", "buffers", "layout"), CASES)
def test_released_files_load_silently(tmp_path, capfd, tokenizer, config, dtype, buffers, layout):
    tensors = released.state(config["num_hidden_layers"], dtype, buffers)
    folder = released.write(tmp_path / "model", config, tensors, layout, tokenizer)
    if layout.endswith("sharded"):
        assert len(list(folder.glob("*-of-00046.*"))) == 46
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, own_tokenizer = neox.load(folder)
    assert capfd.readouterr() == ("", "")
    assert own_tokenizer.sha256 == tokenizer.sha256

    # Nothing is lost, added or changed: the parameters are the stored ones, the buffers are no parameters.
    stored = {n: t for n, t in tensors.items() if not n.endswith((".attention.bias", "masked_bias", "inv_freq"))}
    mine = {n if n.startswith("embed_out") else f"gpt_neox.{n}": p for n, p in model.named_parameters()}
    assert set(mine) == set(stored)
    assert all(torch.equal(mine[n], t.float()) for n, t in stored.items())
    if layout == "bin-legacy":
        return  # transformers reads it too, but only without the mapping that it asks for
    from transformers import AutoModelForCausalLM, AutoTokenizer

    their_tokenizer = AutoTokenizer.from_pretrained(folder)
    assert [their_tokenizer(text)["input_ids"] for text in ADVERSARIAL] == own_tokenizer.encode_batch(ADVERSARIAL)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert relative(model(tokens()), reference(tokens()).logits) <= 1e-5
    half, _ = neox.load(folder, dtype=dtype)
    assert all(torch.equal(p, stored[n if n.startswith("embed_out") else f"gpt_neox.{n}"])
               for n, p in half.named_parameters())  # fmt: skip


def test_the_released_configs_are_the_presets():
    shape = {"hidden_size": 6144, "intermediate_size": 24576, "num_attention_heads": 64, "vocab_size": 50432}
    found = families.read_config(released.CONFIG_20B | shape | {"max_position_embeddings": 2048})
    assert found.model_copy(update={"intermediate_size": None}) == load_config("neox-20b").model
    shape = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12, "vocab_size": 50304}
    found = families.read_config(
        released.CONFIG_PYTHIA | shape | {"intermediate_size": 3072, "max_position_embeddings": 2048}
    )
    assert found.model_copy(update={"intermediate_size": None}) == load_config("pythia-160m").model


def test_the_config_of_every_preset_can_be_written_and_read_back():
    for name in names():
        config = load_config(name).model
        raw = json.loads(json.dumps(families.write_config(config, torch.float16, 0)))
        back = families.read_config(raw)
        free = {"init_method": config.init_method, "intermediate_size": config.intermediate_size}
        assert back.model_copy(update=free) == config, name


ADVERSARIAL = ["", " ", "the cat", " the cat", "a  b   c" + " " * 30 + "d", "\n\n\tx", "e\u0301", "日本語 🏳️\u200d🌈",
               "<|endoftext|>hi<|padding|>", "don't\r\n", "\x00\ufffd\u202e"]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("shard_bytes", [10**9, 40_000])
def test_transformers_loads_a_saved_model(tmp_path, capfd, tokenizer, shard_bytes):
    from transformers import AutoTokenizer

    model = ours(vocab_size=384)
    neox.save(model, tmp_path / "model", tokenizer, shard_bytes)
    assert (shard_bytes > 10**8) == (tmp_path / "model" / "model.safetensors").exists()
    assert relative(read_by_transformers(tmp_path / "model")(tokens()).logits, model(tokens())) <= 1e-5
    again, own = neox.load(tmp_path / "model")
    assert torch.equal(again(tokens()), model(tokens()))
    assert own.sha256 == tokenizer.sha256
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert len(their_tokenizer) == tokenizer.vocab_size
    assert their_tokenizer.eos_token_id == their_tokenizer.bos_token_id == tokenizer.eod_id == 0
    for text in ADVERSARIAL:
        ids = their_tokenizer(text)["input_ids"]
        assert ids == tokenizer.encode(text)
        assert their_tokenizer.decode(ids) == tokenizer.decode(ids)
    assert not list(tmp_path.glob(".*"))


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=60))
def test_tokenizer_ids_of_any_text_equal_those_of_transformers(tokenizer, tmp_path_factory, text):
    folder = tmp_path_factory.getbasetemp() / "same-ids"
    if not folder.exists():
        neox.save(ours(), folder, tokenizer)
    if "same-ids" not in _READ:
        from transformers import AutoTokenizer

        _READ["same-ids"] = AutoTokenizer.from_pretrained(folder)
    assert _READ["same-ids"](text)["input_ids"] == tokenizer.encode(text)


_READ: dict[str, object] = {}


def test_a_tokenizer_without_an_end_token_gains_no_id_in_transformers(tmp_path, tokenizer):
    from transformers import AutoTokenizer

    raw = json.loads(tokenizer._text)
    raw["added_tokens"] = [t for t in raw["added_tokens"] if t["content"] != released.END]
    raw["model"]["vocab"] = {("<gone>" if k == released.END else k): v for k, v in raw["model"]["vocab"].items()}
    other = Tokenizer.from_str(json.dumps(raw))
    assert other.eod_id is None
    neox.save(ours(vocab_size=300), tmp_path / "model", other)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "model")) == 300
    assert json.loads((tmp_path / "model" / "config.json").read_text())["eos_token_id"] is None


@torch.no_grad()
def test_shards_keep_to_their_size_and_the_index_is_exact(tmp_path):
    model = ours(num_hidden_layers=5)
    neox.save(model, tmp_path / "model", shard_bytes=30_000)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    files = sorted(tmp_path.glob("model/model-*.safetensors"))
    assert {f.name for f in files} == set(index["weight_map"].values())
    assert len(files) > 3
    assert all(f.stat().st_size < 30_000 + 4_000 for f in files)


@torch.no_grad()
def test_saving_again_replaces_our_own_checkpoint_whole(tmp_path, tokenizer):
    path = tmp_path / "model"
    neox.save(ours(num_hidden_layers=5), path, tokenizer, shard_bytes=30_000)
    small = ours(seed=3)
    neox.save(small, path)
    assert sorted(p.name for p in path.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    assert torch.equal(neox.load(path)[0](tokens()), small(tokens()))
    theirs().save_pretrained(tmp_path / "theirs")
    neox.save(small, tmp_path / "theirs")
    assert torch.equal(neox.load(tmp_path / "theirs")[0](tokens()), small(tokens()))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "theirs"]


def test_save_refuses_a_folder_with_unrecognized_files(tmp_path):
    for number, name in enumerate(("thesis.tex", "pytorch_model.bin", ".git/config", "model-notes.txt", "step_1/x")):
        path = tmp_path / str(number) / "model"
        neox.save(ours(), path)
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("years of work")
        before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
        with pytest.raises(ValueError, match=r"^[^\n]*holds '" + name.split("/")[0] + r"', [^\n]*choose another$"):
            neox.save(ours(seed=1), path)
        assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before, name
        assert [p.name for p in path.parent.iterdir()] == ["model"], name


def test_save_refuses_a_path_that_is_a_file(tmp_path):
    (tmp_path / "model").write_text("years of work")
    with pytest.raises(ValueError, match="choose another"):
        neox.save(ours(), tmp_path / "model")
    assert (tmp_path / "model").read_text() == "years of work"


def test_a_link_to_a_checkpoint_stays_a_link(tmp_path):
    neox.save(ours(), tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    neox.save(ours(num_hidden_layers=1), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert neox.load(tmp_path / "real")[0].config.num_hidden_layers == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def test_a_config_that_the_family_cannot_express_is_refused_before_writing(tmp_path):
    for flags, field in (
        ({"head_bias": True}, "head_bias"),
        ({"mlp_bias": False}, "mlp_bias"),
        ({"qkv_bias": False}, "dense_bias"),
        ({"position_embedding": "learned"}, "position_embedding"),
        ({"shared_layer_norm": True}, "shared_layer_norm"),
        ({"attention_scale": 1.0}, "attention_scale"),
        ({"model_type": "gptj"}, "shared_layer_norm"),
    ):
        with pytest.raises(ValueError, match=rf"^model\.{field} = [^\n]* cannot be written as a Hugging Face [^\n]*$"):
            neox.save(ours(**flags), tmp_path / "model")
        assert not list(tmp_path.iterdir()), flags


FULL_DISK = """
import json, resource, sys
import neox
from neox.config import ModelConfig
from neox.model.decoder import GPTNeoX
from neox.tokenizer import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1])
shape = dict(vocab_size=300, hidden_size=2, num_hidden_layers=1, num_attention_heads=1)
model = GPTNeoX(ModelConfig(**shape)).initialize()
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
for path, limit in json.loads(sys.argv[2]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        neox.save(model, path, tokenizer)
        message = "no error"
    except OSError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    print(json.dumps(message))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_disk_full_leaves_nothing_new_and_the_old_whole(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "tokenizer.json")
    room = (tmp_path / "tokenizer.json").stat().st_size - 1  # enough for the weights
    runs = []
    for limit in (100, 2000, room):
        for before in (False, True):
            path = tmp_path / f"{limit}-{before}" / "model"
            path.parent.mkdir()
            runs.append((str(path), limit))
            if before:
                neox.save(ours(), path)
    enough = tmp_path / "enough" / "model"
    argv = [
        sys.executable,
        "-c",
        FULL_DISK,
        str(tmp_path / "tokenizer.json"),
        json.dumps([*runs, (str(enough), room + 1)]),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.stderr == ""
    *messages, last = map(json.loads, done.stdout.splitlines())
    assert last == "no error"
    assert (enough / "model.safetensors").stat().st_size < room
    for (path, _), message in zip(runs, messages, strict=True):
        assert "File too large" in message
        assert path in message
        assert "\n" not in message
        there = [p.name for p in Path(path).parent.iterdir()]
        assert there == (["model"] if "True" in path else [])
        if there:
            assert torch.equal(neox.load(path)[0](tokens()), ours()(tokens()))


MEASURE = """
import sys, threading, time
import torch, neox
from pathlib import Path
from neox.checkpoint import model_loader

def anonymous():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) * 1024

folder, dtype = Path(sys.argv[1]), sys.argv[2]
neox.load(sys.argv[3])  # imports and first uses
peak, stop = 0, False
base = anonymous()
def watch():
    global peak
    while not stop:
        peak = max(peak, anonymous())
        time.sleep(0.0005)
watcher = threading.Thread(target=watch)
watcher.start()
real = model_loader._assign
def assign(*args):
    global peak
    peak = max(peak, anonymous())  # when a tensor has been read, and its parts are still held
    return real(*args)
model_loader._assign = assign
model, _ = neox.load(folder, dtype=dtype)
stop = True
watcher.join()
size = sum(p.nbytes for p in model.parameters())
largest = max(p.nbytes for p in model.parameters())
print(peak - base, size, largest)
"""


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc, which only Linux has")
@pytest.mark.parametrize(("stored", "loaded"), [("fp32", "fp32"), ("fp16", "fp32"), ("fp32", "bf16")])
def test_peak_memory_of_loading_is_the_model_and_one_tensor(tmp_path, stored, loaded):
    big = {"vocab_size": 20_000, "hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8}
    model = ours(**big).to({"fp32": torch.float32, "fp16": torch.float16}[stored])
    neox.save(model, tmp_path / "model")
    neox.save(ours(), tmp_path / "tiny")
    argv = [sys.executable, "-c", MEASURE, str(tmp_path / "model"), loaded, str(tmp_path / "tiny")]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, check=True)
    peak, size, largest = map(int, done.stdout.split())
    assert size > 100e6
    assert size * 0.95 < peak < size + largest + 12e6


# --- folders as transformers reads them ------------------------------------------------------------------------------


def their_logits(folder, ids):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits


@torch.no_grad()
def test_a_single_file_wins_over_an_old_index(tmp_path):
    """A folder that was saved in shards, and then whole: its index names shards that are gone, or old weights."""
    old, new, ids = ours(seed=1, num_hidden_layers=3), ours(seed=2, num_hidden_layers=3), tokens()
    for gone in (True, False):
        folder = tmp_path / f"model{gone}"
        neox.save(old, folder, shard_bytes=20_000)
        neox.save(new, tmp_path / "whole")
        shutil.copy(tmp_path / "whole" / "model.safetensors", folder)
        for shard in folder.glob("model-*.safetensors") if gone else ():
            shard.unlink()
        assert relative(neox.load(folder)[0](ids), new(ids)) < 1e-6, gone
        assert relative(their_logits(folder, ids), new(ids)) < 1e-5, gone


@torch.no_grad()
def test_a_stored_head_that_differs_from_the_embedding_is_kept(tmp_path):
    """tie_word_embeddings in the config, and a head of its own in the file: transformers keeps the head."""
    untied, ids = ours(seed=1), tokens()
    for same in (False, True):
        if same:
            untied.embed_out.weight.copy_(untied.embed_in.weight)
        folder = tmp_path / f"model{same}"
        neox.save(untied, folder)
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))
        loaded, _ = neox.load(folder)
        assert loaded.config.tie_word_embeddings is same
        assert relative(loaded(ids), untied(ids)) < 1e-6
        assert relative(their_logits(folder, ids), untied(ids)) < 1e-5


@pytest.mark.parametrize("kind", ["gpt_neox", "gptj"])
@torch.no_grad()
def test_a_folder_without_a_head_loads_for_hidden_states(tmp_path, kind):
    from transformers import AutoModel

    from neox.generate.loading import load_engine

    whole, ids = theirs(kind), tokens()
    whole.base_model.save_pretrained(tmp_path / "bare")
    loaded, _ = neox.load(tmp_path / "bare")
    expected = AutoModel.from_pretrained(tmp_path / "bare", dtype=torch.float32).eval()(ids).last_hidden_state
    assert relative(loaded(ids, head=False), expected) < 1e-5
    words = "saved without a head .as GPTNeoXModel.: it gives hidden states"
    with pytest.raises(ValueError, match=words):
        loaded(ids)
    for use in (load_engine, lambda folder: convert(folder, tmp_path / "out")):
        with pytest.raises(ValueError, match=words):
            use(tmp_path / "bare")
    with pytest.raises(ValueError, match="embed_out.weight is not there as it was trained"):
        neox.save(loaded, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensors_of_integers_are_not_weights(tmp_path):
    from safetensors.torch import load_file, save_file

    neox.save(ours(), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    plain = load_file(path)
    name = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"
    for dtype in (torch.int8, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn):
        save_file(plain | {name: plain[name].to(dtype)}, path)
        with pytest.raises(ValueError, match=rf"{name} is stored as \w+, no floating-point type") as caught:
            neox.load(tmp_path / "model")
        assert "\n" not in str(caught.value), dtype
