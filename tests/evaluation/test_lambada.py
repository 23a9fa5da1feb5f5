"""LAMBADA, the real file: every document's log-likelihood and greedy flag are those of lm-eval's own backend."""

import json
from pathlib import Path

import lm_eval.evaluator
import pytest
from lm_eval.tasks import TaskManager

import neox
from neox.tokenizer import Tokenizer
from tests.evaluation.conftest import hf_backend, save_model

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture
def lambada(tmp_path, monkeypatch):
    """A folder with the model, and one with the task: lm-eval's own but for where its data comes from."""
    for name in ("20B_tokenizer.json", "lambada_test.jsonl"):
        if not (DATA / name).is_file():
            pytest.skip(f"needs ../shared/data/{name}")
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: results.update(lm_eval_version="0"))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    own = Path(lm_eval.evaluator.__file__).parent / "tasks" / "lambada" / "lambada_openai.yaml"
    (tasks / "lambada.yaml").write_text(
        f"include: {own}\ntask: lambada\ntag: null\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs: {{data_files: {{test: {DATA / 'lambada_test.jsonl'}}}}}\n"
    )
    tokenizer = Tokenizer.from_file(DATA / "20B_tokenizer.json")
    return save_model(tmp_path / "model", tokenizer, context=256), tasks


@pytest.mark.parametrize(
    ("limit", "count"), [pytest.param(60, 60, id="60"), pytest.param(None, 5153, id="all", marks=pytest.mark.slow)]
)
def test_lambada_scores(lambada, tmp_path, limit, count):
    folder, tasks = lambada
    out = tmp_path / "out"
    ours = neox.evaluate(folder, "lambada", out, include_path=str(tasks), limit=limit, log_samples=True, progress=False)
    # One by one: tensors of more logits than that get fresh memory each time, which takes longer than the products.
    theirs = hf_backend(folder, batch_size=1)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    reference = lm_eval.evaluator.simple_evaluate(theirs, tasks=["lambada"], task_manager=manager, limit=limit)
    pairs = list(zip(ours["samples"]["lambada"], reference["samples"]["lambada"], strict=True))
    assert len(pairs) == count
    for mine, other in pairs:
        [[[logprob, greedy]]], [[[their_logprob, their_greedy]]] = mine["resps"], other["resps"]
        assert logprob == pytest.approx(their_logprob, abs=1e-4), mine["doc"]
        assert greedy == their_greedy
    assert ours["results"]["lambada"]["acc,none"] == reference["results"]["lambada"]["acc,none"]
    perplexity = reference["results"]["lambada"]["perplexity,none"]
    assert ours["results"]["lambada"]["perplexity,none"] == pytest.approx(perplexity, rel=1e-5)
    assert len(json.loads((out / "results.json").read_text())["results"]) == 1
