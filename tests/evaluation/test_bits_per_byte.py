"""Bits per byte on files of the Pile: against a loop over segments, lm-eval's windows, and a model known in full."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import neox
from neox.cli import main
from neox.corpus.pile.statistics import total
from neox.evaluation.bits_per_byte import score, score_files
from neox.tokenizer import Tokenizer, train_bpe
from tests import tiny

WINDOW = 8
DOCUMENTS = [
    ("Github", "int main() { return 0; } // as long as several segments, and then some more of it"),
    ("ArXiv", "we show"),
    ("Github", "été <|endoftext|> is text"),
    ("ArXiv", ""),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([text for _, text in DOCUMENTS], vocab_size=300)


def prefix_model(tokens: Tensor) -> Tensor:
    """Logits [B, T, 400] that depend on all tokens so far and on their order."""
    state = torch.cumsum(tokens.double() * torch.arange(1, tokens.shape[1] + 1).sqrt(), dim=1)
    return torch.sin(state[..., None] * torch.arange(1, 401).double() * 0.37) * 3


def test_each_segment_is_scored_by_itself(tokenizer: Tokenizer):
    found = score(prefix_model, tokenizer, DOCUMENTS, WINDOW, batch=3)
    for component in ("Github", "ArXiv"):
        expected, count, size = 0.0, 0, 0
        for name, text in DOCUMENTS:
            if name != component:
                continue
            tokens = tokenizer.encode(text, specials=False)
            before = tokenizer.eod_id
            for start in range(0, len(tokens), WINDOW):
                segment = tokens[start : start + WINDOW]
                logprobs = prefix_model(torch.tensor([[before, *segment[:-1]]])).log_softmax(-1)[0]
                expected += sum(logprobs[i, token].item() for i, token in enumerate(segment))
                before = segment[-1]
            count, size = count + len(tokens), size + len(text.encode())
        assert found[component].loglikelihood == pytest.approx(expected, rel=1e-6)
        assert (found[component].tokens, found[component].bytes) == (count, size)
    assert found["Github"].tokens > 2 * WINDOW


def test_the_windows_are_those_of_lm_eval_where_the_last_one_is_full(tokenizer: Tokenizer):
    utils = pytest.importorskip("lm_eval.utils")
    text = DOCUMENTS[0][1]
    tokens = tokenizer.encode(text, specials=False)
    while len(tokens) % WINDOW:
        text = text[:-1]
        tokens = tokenizer.encode(text, specials=False)
    assert len(tokens) >= 3 * WINDOW
    expected = 0.0
    for given, wanted in map(
        utils.make_disjoint_window, utils.get_rolling_token_windows(tokens, tokenizer.eod_id, WINDOW, 1)
    ):
        logprobs = prefix_model(torch.tensor([given + wanted[:-1]])).log_softmax(-1)[0, -len(wanted) :]
        expected += sum(logprobs[i, token].item() for i, token in enumerate(wanted))
    assert score(prefix_model, tokenizer, [("a", text)], WINDOW)["a"].loglikelihood == pytest.approx(expected, rel=1e-6)


def test_bits_per_byte_of_files(tokenizer: Tokenizer, tmp_path: Path):
    """A model that knows nothing needs log2(V) bits a token."""
    file = tmp_path / "test.jsonl"
    lines = [json.dumps({"text": text, "meta": {"pile_set_name": name}}) for name, text in DOCUMENTS]
    file.write_text("\n".join(lines))

    def uniform(tokens: Tensor) -> Tensor:
        return torch.zeros((*tokens.shape, 512))

    found = score_files(uniform, tokenizer, "uniform", str(file), tmp_path, WINDOW, progress=False)
    content = json.loads((tmp_path / "bits_per_byte.json").read_bytes())["rows"]
    for name, row in [*found.items(), ("total", total(found.values())), ("miscellaneous", found["Github"])]:
        assert content[name]["bits_per_byte"] == pytest.approx(9 * row.tokens / row.bytes, rel=1e-6)
    assert (
        f"| Github | {found['Github'].bytes} | {found['Github'].tokens} |"
        in (tmp_path / "bits_per_byte.md").read_text()
    )
    one = score_files(uniform, tokenizer, "uniform", str(file), tmp_path, WINDOW, limit=1, progress=False)
    assert one["Github"].bytes == len(DOCUMENTS[0][1])
    assert math.isclose(one["Github"].bits_per_byte, 9 * one["Github"].tokens / one["Github"].bytes, rel_tol=1e-6)
    file.write_text(json.dumps({"text": "a", "meta": {}}))
    with pytest.raises(ValueError, match=r"test.jsonl: document 0 from there has no meta.pile_set_name"):
        score_files(uniform, tokenizer, "uniform", str(file), tmp_path, WINDOW, progress=False)


def test_bits_per_byte_command(tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = tiny.ours(vocab_size=320)
    neox.save(model, tmp_path / "model", tokenizer)
    file = tmp_path / "test.jsonl"
    lines = [json.dumps({"text": text, "meta": {"pile_set_name": name}}) for name, text in DOCUMENTS]
    file.write_text("\n".join(lines))
    assert main(["eval", str(tmp_path / "model"), f"pile={file}", "limit=2", f"out={tmp_path / 'out'}"]) == 0
    rows = json.loads((tmp_path / "out" / "bits_per_byte.json").read_text())["rows"]
    wanted = score(model, tokenizer, DOCUMENTS[:2], tiny.CONTEXT)
    for name in ("Github", "ArXiv"):
        assert rows[name]["bits_per_byte"] == pytest.approx(wanted[name].bits_per_byte, rel=1e-5)
    assert "Github" in capsys.readouterr().out
    assert main(["eval", str(tmp_path / "model"), f"pile={file}", "num_fewshot=2"]) == 2
    assert "num_fewshot" in capsys.readouterr().err
