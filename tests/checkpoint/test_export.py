"""Export of a run to a Hugging Face folder, shard by shard: the same files, without the whole in memory."""

import weakref

import pytest
import torch

import neox
from neox import cli
from neox.checkpoint import save_step
from neox.checkpoint.export import convert, parse_bytes
from neox.checkpoint.step_weights import StepWeights
from neox.config import Config, DataConfig
from tests.tiny import GPT_J, GPT_NEO, ours, tokens
from tests.train.helpers import one_line

SHARD = 30_000


@pytest.fixture
def step(tmp_path, tokenizer):
    def make(**options):
        model = ours(seed=4, **options)
        config = Config(model=model.config, data=DataConfig(seq_length=16))
        folder = save_step(tmp_path / "run", [model], [], config, {"step": 3, "samples": 3, "updates": 3})
        tokenizer.save(tmp_path / "run" / "tokenizer.json")
        return model, folder

    return make


@pytest.mark.parametrize("kind", [{}, {"tie_word_embeddings": True}, GPT_J, GPT_NEO], ids=["neox", "tied", "j", "neo"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_converted_files_equal_those_of_a_saved_model(tmp_path, step, tokenizer, kind, dtype):
    model, folder = step(**kind)
    count = convert(folder.parent, tmp_path / "streamed", dtype, SHARD)
    assert count == sum(parameter.numel() for parameter in model.parameters())
    neox.save(model.to(torch.bfloat16 if dtype == "bf16" else torch.float32), tmp_path / "saved", tokenizer, SHARD)
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names == {path.name for path in (tmp_path / "streamed").iterdir()}
    assert "model.safetensors.index.json" in names
    for name in names:
        assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes(), name


@torch.no_grad()
def test_transformers_loads_a_converted_run(tmp_path, step):
    from transformers import AutoModelForCausalLM

    model, folder = step()
    out = tmp_path / "hf"
    assert cli.main(["convert", str(folder), f"out={out}", "shard_size=30kB"]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    torch.testing.assert_close(theirs(tokens()).logits, model.eval()(tokens()), rtol=0, atol=1e-5)


def test_convert_holds_one_shard_in_memory(tmp_path, step, monkeypatch):
    model, folder = step(num_hidden_layers=6)
    alive, peak = [], 0
    plain = StepWeights.read

    def read(self, *arguments):
        nonlocal peak
        tensor = plain(self, *arguments)
        alive.append((weakref.ref(tensor), tensor.nbytes))
        peak = max(peak, sum(size for tensor, size in alive if tensor() is not None))
        return tensor

    monkeypatch.setattr(StepWeights, "read", read)
    convert(folder, tmp_path / "out", None, SHARD)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    assert sum(size for _, size in alive) == whole > 4 * SHARD
    largest = max(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert peak <= largest


def test_shard_size_is_parsed(capsys, tmp_path):
    assert [parse_bytes(text) for text in ("5GB", "500MB", "1.5k", "70", "2T")] == [5e9, 5e8, 1500, 70, 2e12]
    for text in ("", "GB", "-1", "0", "5 apples", "1.2.3"):
        with pytest.raises(ValueError, match="write it as 5GB or 500MB"):
            parse_bytes(text)
    assert cli.main(["convert", str(tmp_path), f"out={tmp_path / 'out'}", "shard_size=big"]) == 1
    one_line(capsys.readouterr().err, "big: is no size")


def test_a_type_that_holds_no_weights_writes_nothing(tmp_path, capsys):
    """int8 wrote zeros, and said that all was well."""
    neox.save(ours(), tmp_path / "model")
    for wrong in ("int8", "bool", "complex64", "long", "float8_e4m3fn"):
        assert cli.main(["convert", str(tmp_path / "model"), f"out={tmp_path / 'out'}", f"dtype={wrong}"]) == 1, wrong
        err = capsys.readouterr().err
        assert err.startswith(f"neox: error: dtype '{wrong}' holds no weights"), wrong
        assert err.count("\n") == 1, wrong
        assert not (tmp_path / "out").exists(), wrong
