"""Several processes: each request asked once and by one of them, and the results of one process, to the bit."""

import json
import os

import lm_eval.evaluator
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import neox
from neox.evaluation import sharing
from neox.evaluation.sharing import split_requests
from neox.system.processes import Processes, joined_processes
from tests.evaluation.helpers import ALL, write_tasks
from tests.parallel.helpers import together

TEXTS = st.lists(st.text("ab", max_size=40), max_size=30)


@given(TEXTS, st.integers(1, 5))
def test_requests_are_split_into_sorted_disjoint_parts(texts, world):
    parts = split_requests(texts, world)
    assert len(parts) == world
    whole = [number for part in parts for number in part]
    assert sorted(whole) == list(range(len(texts)))
    assert [texts[number] for number in whole] == sorted(texts)


@given(TEXTS, st.integers(1, 5))
def test_request_parts_are_balanced(texts, world):
    """In characters that a prefix tree without a bound would compute, counted by a set of all beginnings."""

    def cost(numbers):
        beginnings = {texts[number][:end] for number in numbers for end in range(1, len(texts[number]) + 1)}
        return len(beginnings) + sharing.REQUEST_COST * len(numbers)

    parts = split_requests(texts, world)
    # What the first text of a part shares with the one before it is computed twice.
    most = cost(range(len(texts))) / world + 2 * max((len(text) for text in texts), default=0) + sharing.REQUEST_COST
    assert all(cost(part) <= most + 1e-6 for part in parts)


def test_requests_with_a_common_prefix_stay_together():
    first, second = "x" * 500, "y" * 500
    texts = [beginning + str(number) for number in range(40) for beginning in (first, second)]
    parts = split_requests(texts, 2)
    assert {texts[number][0] for number in parts[0]} == {"x"}
    assert {texts[number][0] for number in parts[1]} == {"y"}


def evaluated(folder, tasks, out):
    torch.set_num_threads(1)
    lm_eval.evaluator.add_env_info = lambda results: results.update(lm_eval_version="0")  # takes it seconds
    asked = []
    with joined_processes("cpu") as processes:
        os.environ["LOCAL_RANK"] = str(processes.rank)  # as torchrun does, which lm-eval looks at
        plain = sharing._distributed

        def counted(ask, group):
            return plain(lambda requests, **options: asked.append(len(requests)) or ask(requests, **options), group)

        sharing._distributed = counted
        try:
            options = {"include_path": str(tasks), "log_samples": True, "progress": False}
            results = neox.evaluate(folder, ALL, out, processes=processes, **options)
        finally:
            sharing._distributed = plain
    if not results:
        return None, None, sum(asked)
    answers = {
        (task, one["doc_id"]): one["filtered_resps"] for task, many in results["samples"].items() for one in many
    }
    return results["results"], answers, sum(asked)


def test_eval_on_two_processes_equals_one(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", None)  # it is put back
    monkeypatch.setenv("LOCAL_RANK", "0")
    tasks = write_tasks(tmp_path / "tasks")
    scores, answers, _ = evaluated(folder, tasks, tmp_path / "one")
    found = together(2, tmp_path / "ranks", evaluated, folder, tasks, tmp_path / "two")
    assert [rank[:2] for rank in found] == [(scores, answers), (None, None)]
    shared = [asked for *_, asked in found]
    assert sum(shared) == len(ALL) * 12 + 3 * 12  # four choices in one of the tasks
    assert min(shared) > 0.25 * sum(shared)
    assert json.loads((tmp_path / "two" / "results.json").read_text())["results"] == scores
    lines = [(tmp_path / name / "answers.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert sorted(lines[0]) == sorted(lines[1])


def test_other_backends_are_not_shared(folder, tmp_path):
    tasks = write_tasks(tmp_path / "tasks")
    with pytest.raises(ValueError, match=r"^lm-eval:dummy: several processes share the requests of our own engine"):
        neox.evaluate("lm-eval:dummy", ALL, include_path=str(tasks), processes=Processes(0, 2))
