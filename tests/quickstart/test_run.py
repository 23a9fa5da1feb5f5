"""`neox quickstart` end to end, on a corpus of a few files and a model that trains in seconds."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from neox.checkpoint import load
from neox.generate import bits_per_byte, token_logprobs
from neox.quickstart.corpus import Corpus, build_corpus
from neox.quickstart.run import quickstart
from neox.system.files import try_lock
from neox.train import Trainer

TINY = [
    *("tokenizer.vocab_size=400", "model.vocab_size=400", "hidden_size=32", "num_hidden_layers=2"),
    *("num_attention_heads=2", "max_position_embeddings=64", "seq_length=64", "train.steps=9"),
    *("global_batch_size=4", "micro_batch_size=4", "log.every=1", "checkpoint.every=4"),
]


@pytest.fixture(scope="module")
def small_corpus() -> Corpus:
    whole = build_corpus()
    train = [(path, text[:4000]) for path, text in whole.train[:60]]
    heldout = [(path, text[:6000]) for path, text in whole.heldout[:4]]
    return Corpus(train, heldout, whole.pinned_files, [], [], None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_corpus) -> Path:
    out = tmp_path_factory.mktemp("quickstart") / "run"
    assert quickstart(TINY, small_corpus, out).finished
    return out


def test_quickstart_leaves_what_it_promises(finished, small_corpus, capsys):
    assert {"hf", "loss.png", "flipbook.html", "tokenizer.json", "metrics.jsonl"} <= {
        p.name for p in finished.iterdir()
    }
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    pages = [json.loads(p.read_bytes()) for p in sorted((finished / "pages").iterdir())]
    assert [page["step"] for page in pages] == [0, 1, 2, 4, 8, 9]
    assert pages[-1]["bpb"] < pages[0]["bpb"]
    assert "step" in (finished / "flipbook.html").read_text()


def test_the_score_is_what_the_exported_model_gives_in_transformers(finished, small_corpus):
    """Recomputed here from the definition: -log2 p over all held-out tokens, documents joined by end-of-document."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished / "hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(finished / "hf")
    ids = [0]
    for _, text in small_corpus.heldout:
        ids += [*tokenizer(text)["input_ids"], 0]
    nats, window, stride = 0.0, 64, 32
    scored, start = 1, 0
    with torch.no_grad():
        while scored < len(ids):
            part = torch.tensor([ids[start : start + window + 1]])
            logprobs = model(part[:, :-1]).logits.log_softmax(-1).gather(-1, part[:, 1:, None])[0, :, 0]
            new = start + part.shape[1] - scored
            nats -= logprobs[-new:].double().sum().item()
            scored += new
            start += stride
    size = sum(len(text.encode()) for _, text in small_corpus.heldout)
    last = max((finished / "pages").iterdir())
    assert json.loads(last.read_bytes())["bpb"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_our_model_scores_the_same(finished, small_corpus):
    model, tokenizer = load(finished)
    ids = [i for _, text in small_corpus.heldout for i in (*tokenizer.encode(text), 0)]
    scores = token_logprobs(model, ids, 64, 32, first=0)
    last = max((finished / "pages").iterdir())
    assert json.loads(last.read_bytes())["bpb"] == pytest.approx(
        bits_per_byte(scores, len(small_corpus.heldout_bytes)), rel=1e-5
    )


def test_quickstart_resumed_after_ctrl_c_has_the_same_weights(finished, small_corpus, tmp_path, monkeypatch, capsys):
    step = Trainer.train_step

    def stopping(self):
        if self.step == 5:
            self.stop_signal = 2
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stopping)
        assert not quickstart(TINY, small_corpus, tmp_path / "run").finished
    assert quickstart(TINY, small_corpus, tmp_path / "run").finished
    assert "Continued from step 6, bit-identically: the weights and the optimizer state" in capsys.readouterr().err

    def digest(run: Path) -> str:
        return hashlib.sha256((run / "hf" / "model.safetensors").read_bytes()).hexdigest()

    assert digest(tmp_path / "run") == digest(finished)
    pages = [json.loads(p.read_bytes())["samples"] for p in sorted((tmp_path / "run" / "pages").iterdir())]
    assert pages == [json.loads(p.read_bytes())["samples"] for p in sorted((finished / "pages").iterdir())]


def test_another_configuration_in_the_same_folder_is_refused(finished, small_corpus):
    with pytest.raises(ValueError, match=r"another train\.seed"):
        quickstart([*TINY, "train.seed=5"], small_corpus, finished)


def test_quickstart_resumed_after_a_kill_repeats_the_same_losses(small_corpus, tmp_path, monkeypatch, capsys):
    step = Trainer.train_step

    def dying(self):
        if self.step == 7:  # steps 5 to 7 are logged, the last checkpoint is that of step 4
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", dying)
        with pytest.raises(KeyboardInterrupt):
            quickstart(TINY, small_corpus, tmp_path / "run")
    rows = tmp_path / "run" / "metrics.jsonl"
    kept = rows.read_bytes()
    assert quickstart([*TINY], small_corpus, tmp_path / "run").finished
    assert "step 4, bit-identically: 3 logged steps computed again" in capsys.readouterr().err

    # The check can fail: with another loss on record it says so.
    for folder in ("step_00000008", "step_00000009"):
        shutil.rmtree(tmp_path / "run" / folder)
    lines = [json.loads(line) for line in kept.splitlines()]
    lines[-1]["loss"] += 1e-6
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert quickstart([*TINY], small_corpus, tmp_path / "run").finished
    assert "not bit-identically: step 7's loss differs" in capsys.readouterr().err


def test_quickstart_writes_into_no_folder_of_others(finished, small_corpus, tmp_path):
    """Another run, a folder with files, and a folder in which another quickstart is running."""
    run = shutil.copytree(finished, tmp_path / "run")
    (run / ".quickstart").unlink()  # as `neox train` leaves it
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("words")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for folder in (run, text, run / "step_00000004"):
        with pytest.raises(ValueError, match="holds files that quickstart did not write: choose another out="):
            quickstart(TINY, small_corpus, folder)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    busy = tmp_path / "busy"
    busy.mkdir()
    with (busy / ".quickstart").open("ab") as file:
        assert try_lock(file)
        with pytest.raises(ValueError, match="another quickstart is running here"):
            quickstart(TINY, small_corpus, busy)
    assert [path.name for path in busy.iterdir()] == [".quickstart"]
