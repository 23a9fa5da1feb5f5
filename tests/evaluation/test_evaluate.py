"""Whole evaluations: the scores of lm-eval's own backend, files, answers that are not asked for twice, errors."""

import json
import multiprocessing
import os
import re
import signal
from functools import partial

import lm_eval.evaluator
import pytest
import torch
from lm_eval.tasks import TaskManager

import neox
from neox import cli
from neox.evaluation.adapter import EngineLM
from neox.evaluation.answers import METHODS, AnswerCache
from neox.generate.loading import load_engine
from tests import tiny
from tests.evaluation.helpers import ALL, close, write_tasks


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("own") / "tasks")


@pytest.fixture(autouse=True)
def _unsaid(request, monkeypatch):
    """What lm-eval tells of the machine takes it longer than these evaluations: one test looks at it."""
    if request.node.name != "test_the_scores_are_those_of_lm_evals_own_backend":
        monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: results.update(lm_eval_version="0"))


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """How many requests each call of the model's methods was for."""
    counts: list[int] = []

    def counted(method):
        def count(self, requests, **options):
            counts.append(len(requests))
            return method(self, requests, **options)

        return count

    for name in METHODS:
        monkeypatch.setattr(EngineLM, name, counted(getattr(EngineLM, name)))
    return counts


def test_the_scores_are_those_of_lm_evals_own_backend(folder, tasks, theirs, tmp_path):
    ours = neox.evaluate(folder, ALL, tmp_path, include_path=str(tasks), log_samples=True, progress=False)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    reference = lm_eval.simple_evaluate(theirs, tasks=list(ALL), task_manager=manager)
    for part in ("results", "n-shot", "versions", "n-samples", "higher_is_better", "group_subtasks"):
        assert close(ours[part], reference[part]), part
    assert set(reference) - {"git_hash"} <= set(ours) | {
        # These describe a tokenizer of transformers.
        *("tokenizer_pad_token", "tokenizer_eos_token", "tokenizer_bos_token", "eot_token_id", "max_length")
    }
    for task in ALL:
        for mine, other in zip(ours["samples"][task], reference["samples"][task], strict=True):
            assert mine["prompt_hash"] == other["prompt_hash"]
            assert close(mine["filtered_resps"], other["filtered_resps"])
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["results"] == ours["results"]
    assert stored["config"]["model"] == "neox"
    assert stored["config"]["model_num_parameters"] == theirs.model.num_parameters()
    assert stored["task_hashes"].keys() == set(ALL)
    samples = [json.loads(line) for line in (tmp_path / "samples_sums_choose.jsonl").read_text().splitlines()]
    assert [sample["doc_id"] for sample in samples] == list(range(12))
    assert samples[0]["arguments"]["gen_args_0"]["arg_1"] == " " + samples[0]["doc"]["choices"][0]


def test_a_command_prints_and_writes_tables(folder, tasks, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["eval", str(folder), "tasks=sums_choose,sums_read", f"include_path={tasks}", "limit=5"]
    assert cli.main([*command, "num_fewshot=1"]) == 0
    printed = capsys.readouterr().out
    (out,) = (tmp_path / "evals").glob("*/sums_choose,sums_read")
    results = json.loads((out / "results.json").read_text())
    assert results["n-samples"]["sums_choose"]["effective"] == 5
    assert results["n-shot"]["sums_choose"] == 1
    table = (out / "results.md").read_text()
    assert printed.startswith(table)
    said = "limit=5: only the first 5 documents of each task count here."
    assert table.endswith(f"|\n\n{said}\n")
    rows = [line for line in table.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in rows]
    found = results["results"]["sums_choose"]
    expected = ["sums_choose", "1", "none", "1", "acc", f"{found['acc,none']:.4f}", f"{found['acc_stderr,none']:.4f}"]
    assert expected in cells
    page = (out / "results.html").read_text()
    assert f"<strong>{said}</strong>" in page
    assert [re.findall(r"<td>(.*?)</td>", line) for line in page.splitlines() if "<td>" in line] == cells[2:]
    assert cli.main([*command, "num_fewshot=1", "log_samples=true"]) == 0
    before = (out / "results.json").read_bytes()
    assert cli.main([*command, "num_fewshot=0"]) == 1
    assert "holds results of another model, other tasks or other options" in capsys.readouterr().err
    assert (out / "results.json").read_bytes() == before
    assert cli.main([*command, "num_fewshot=0", "overwrite=true"]) == 0


def test_answer_cache_is_reused(folder, tasks, tmp_path, asked):
    """A run that a crash cut in its last line asks one request; a finished one none; another model all."""
    options = {"include_path": str(tasks), "progress": False}
    whole = neox.evaluate(folder, ALL, tmp_path / "out", **options)
    assert sum(asked) == 12 * 4 + 12 + 12
    file = tmp_path / "out" / "answers.jsonl"
    asked.clear()
    again = neox.evaluate(folder, ALL, tmp_path / "out", **options)
    assert again["results"] == whole["results"]
    assert asked == []
    file.write_bytes(file.read_bytes()[:-3])
    assert neox.evaluate(folder, ALL, tmp_path / "out", **options)["results"] == whole["results"]
    assert asked == [1]
    asked.clear()
    neox.evaluate(folder, ALL, tmp_path / "out", **options)
    assert asked == []
    engine = load_engine(folder, "cpu", weights="torch")
    with torch.no_grad():
        engine.model.layers[1].attention.dense.weight.mul_(1.01)
    neox.evaluate(engine, ["sums_choose"], tmp_path / "out", **options)
    assert asked == [48]


def test_answer_cache_after_a_kill(folder, tasks, tmp_path, asked, monkeypatch):
    out, keep = tmp_path / "out", AnswerCache.add_partial

    def add_and_die(self, *answer):
        keep(self, *answer)
        if self.added == 20:
            os.kill(os.getpid(), signal.SIGKILL)

    run = partial(neox.evaluate, folder, ["sums_choose"], include_path=str(tasks), progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(AnswerCache, "add_partial", add_and_die)
        child = multiprocessing.get_context("fork").Process(target=run, kwargs={"out": out})
        child.start()
        child.join()
    assert child.exitcode == -signal.SIGKILL
    assert len((out / "answers.jsonl").read_text().splitlines()) == 20
    assert not (out / "results.json").exists()
    results = run(out=out)
    assert asked == [48 - 20]
    assert results["results"] == run()["results"]


def test_an_interrupted_eval_says_how_to_continue(folder, tasks, tmp_path, capsys, asked, monkeypatch):
    keep = AnswerCache.add_partial

    def add_and_interrupt(self, *answer):
        keep(self, *answer)
        if self.added == 5:
            raise KeyboardInterrupt

    command = ["eval", str(folder), "tasks=sums_choose", f"include_path={tasks}", f"out={tmp_path / 'out'}"]
    with monkeypatch.context() as patch:
        patch.setattr(AnswerCache, "add_partial", add_and_interrupt)
        assert cli.main(command) == 130
    assert f"the same command asks what {tmp_path / 'out'} does not answer yet" in capsys.readouterr().err
    asked.clear()
    assert cli.main(command) == 0
    assert asked == [48 - 5]


def test_sampled_answers_are_not_cached(tmp_path):
    with AnswerCache(tmp_path / "answers.jsonl", "someone") as answers:
        for options in ({"do_sample": True}, {"temperature": 0.5}):
            answers.add_partial("generate_until", ("context", options), "drawn")
        answers.add_partial("generate_until", ("context", {"do_sample": False, "temperature": 0.5}), "greedy")
    assert answers.path.read_text().count("\n") == 1


def test_hf_backend_for_comparison(folder, tasks, tmp_path, capsys):
    command = ["tasks=sums_choose", f"include_path={tasks}", "limit=6", "device=cpu"]
    assert cli.main(["eval", f"hf:{folder}", *command, "dtype=fp32", f"out={tmp_path / 'hf'}"]) == 0
    assert cli.main(["eval", str(folder), *command, f"out={tmp_path / 'ours'}"]) == 0
    theirs, ours = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("hf", "ours"))
    assert theirs["results"] == ours["results"]
    assert theirs["config"]["model"] == "hf"
    assert theirs["config"]["model_dtype"] == "torch.float32"


def said(capsys, *arguments: str) -> str:
    assert cli.main(["eval", *map(str, arguments)]) in (1, 2)
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_eval_errors_are_one_line(folder, tasks, tmp_path, capsys, monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("neox.evaluation.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    own = f"include_path={tasks}"
    assert "did you mean sums_choose" in said(capsys, folder, "tasks=sums_chose", own)
    assert "lost cannot be loaded: " in (line := said(capsys, folder, "tasks=lost", own))
    assert "lost.jsonl" in line
    assert "far cannot be loaded: " in (line := said(capsys, folder, "tasks=far", own))
    assert "nobody/far-away" in line
    assert "is no folder" in said(capsys, folder, "tasks=a", "include_path=nowhere")
    assert "needs tasks=NAME" in said(capsys, folder)
    assert "no option every" in said(capsys, folder, "tasks=a", "every=3")
    assert "did you mean local-completions?" in said(capsys, "lm-eval:local-completion", "tasks=sums_read", own)
    assert "model_args= is for hf:ID" in said(capsys, folder, "tasks=sums_read", own, "model_args=a=b")
    assert "cannot be loaded" in said(capsys, f"hf:{tmp_path / 'nothing'}", "tasks=sums_read", own)
    bare = tmp_path / "bare"
    neox.save(tiny.ours(), bare)
    assert f"{bare}: evaluation needs a tokenizer" in said(capsys, bare, "tasks=sums_read", own)


def test_task_groups_and_yaml_files(folder, tasks, tmp_path, monkeypatch):
    monkeypatch.setattr("neox.evaluation.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    neox.evaluate(folder, "sums", tmp_path, include_path=str(tasks), limit=3, progress=False)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["groups"]["sums"]["acc,none"] == results["results"]["sums_choose"]["acc,none"]
    assert [line.split("|")[1][1:].rstrip() for line in (tmp_path / "results.md").read_text().splitlines()[2:5]] == [
        "sums",
        "  sums_choose",
        "  sums_write",
    ]
    assert set(neox.evaluate(folder, str(tasks / "read.yaml"), progress=False)["results"]) == {"sums_read"}


@pytest.mark.slow
def test_lm_evals_own_tasks_are_known(folder, capsys):
    assert "did you mean lambada_openai" in said(capsys, folder, "tasks=lambada_opnai")


def test_an_evaluation_that_measures_nothing_is_an_error(folder, tasks, tmp_path, capsys):
    task = tmp_path / "odd.yaml"
    text = (tasks / "choose.yaml").read_text()
    task.write_text(
        re.sub(r"metric_list: .*", "metric_list: [{metric: no_such_metric}]", text).replace("sums_choose", "odd")
    )
    status = cli.main(["eval", str(folder), f"tasks={task}", f"out={tmp_path / 'out'}", "limit=2"])
    err = capsys.readouterr().err
    assert status == 1, err
    assert not (tmp_path / "out" / "results.json").exists()
