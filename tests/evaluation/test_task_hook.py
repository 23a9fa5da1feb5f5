"""Tasks while a model is trained: at the right steps, as of the saved checkpoint, and training does not notice."""

import json
import random

import lm_eval.evaluator
import numpy as np
import pytest
import torch

import neox
from neox import cli
from neox.checkpoint import complete_steps
from neox.config import load_config
from neox.evaluation.task_hook import TaskHook
from neox.train import Trainer
from neox.train.metrics import read_rows
from tests.evaluation.helpers import write_tasks
from tests.evaluation.test_curves import options
from tests.parallel.helpers import together
from tests.train.helpers import assert_same_step, rows


@pytest.fixture(autouse=True)
def _unsaid(monkeypatch):
    """What lm-eval tells of the machine takes it longer than these evaluations."""
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: results.update(lm_eval_version="0"))


@pytest.fixture
def asked(tmp_path):
    tasks = write_tasks(tmp_path / "tasks")
    return ("eval.tasks=sums_choose", f"eval.include_path={tasks}", "eval.limit=4", "eval.tasks_every=2")


def scored(run):
    key = "tasks/sums_choose acc"
    return {row["step"]: row[key] for row in read_rows(run / "metrics.jsonl") if key in row}


def test_training_with_the_task_hook_is_bit_identical(tmp_path, asked):
    states = []

    def look(trainer, step):
        modes = [module.training for module in trainer.model.modules()]
        states.append((torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(), modes))

    text = options(tmp_path)
    plain = load_config(overrides=[*text, f"out={tmp_path / 'plain'}"])
    Trainer(plain, quiet=True).fit()
    config = load_config(overrides=[*text, *asked, f"out={tmp_path / 'run'}"])
    Trainer(config, hooks=(look, TaskHook(config), look), quiet=True).fit()
    assert states[::2] == states[1::2]
    run = tmp_path / "run"
    assert [row for row in rows(run) if "loss" in row] == rows(tmp_path / "plain")
    assert_same_step(*(complete_steps(folder)[-1] for folder in (run, tmp_path / "plain")), tmp_path)
    found = scored(run)
    assert list(found) == [0, 2, 4]
    for step, value in found.items():
        saved = neox.evaluate(
            run / f"step_{step:08d}", "sums_choose", include_path=config.eval.include_path, limit=4, progress=False
        )
        assert saved["results"]["sums_choose"]["acc,none"] == value
        kept = json.loads((run / "evals" / f"step_{step:08d}" / "results.json").read_text())
        assert kept["results"]["sums_choose"]["acc,none"] == value
    assert json.loads((run / "evals" / "curves.json").read_text())["sums_choose acc"]["step"] == [0, 2, 4]


def test_task_hook_of_a_resumed_run_does_not_repeat(tmp_path, asked, capsys):
    text = options(tmp_path)
    out = f"out={tmp_path / 'run'}"
    assert cli.main(["train", *text, *asked, out, "steps=2"]) == 0
    assert "step 2: sums_choose acc 0." in capsys.readouterr().err
    stamp = (tmp_path / "run" / "evals" / "step_00000002" / "results.json").stat().st_mtime_ns
    again = f"eval.include_path={tmp_path / 'tasks'}"
    assert cli.main(["train", f"resume={tmp_path / 'run'}", "steps=4"]) == 1
    assert "task files may run code, which a run directory may not ask for: name it" in capsys.readouterr().err
    assert cli.main(["train", f"resume={tmp_path / 'run'}", "steps=4", again]) == 0
    assert list(scored(tmp_path / "run")) == [0, 2, 4]
    assert (tmp_path / "run" / "evals" / "step_00000002" / "results.json").stat().st_mtime_ns == stamp


FILTERS = """
filter_list:
- {name: whole, filter: [{function: take_first}]}
- {name: digit, filter: [{function: regex, regex_pattern: "[0-9]"}, {function: take_first}]}
"""


def test_task_hook_logs_a_score_per_filter(tmp_path, asked):
    task = (tmp_path / "tasks" / "write.yaml").read_text()
    (tmp_path / "tasks" / "filtered.yaml").write_text(task.replace("sums_write", "sums_filtered") + FILTERS)
    only = ("eval.tasks=sums_filtered", "eval.tasks_every=4", f"out={tmp_path / 'run'}")
    config = load_config(overrides=[*options(tmp_path), *asked, *only])
    Trainer(config, hooks=(TaskHook(config),), quiet=True).fit()
    row = next(row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "loss" not in row)
    names = {f"sums_filtered exact_match ({name})" for name in ("whole", "digit")}
    assert row.keys() >= {f"tasks/{name}" for name in names}
    assert json.loads((tmp_path / "run" / "evals" / "curves.json").read_text()).keys() == names


def many(overrides):
    lm_eval.evaluator.add_env_info = lambda results: results.update(lm_eval_version="0")
    config = load_config(overrides=overrides)
    Trainer(config, hooks=(TaskHook(config),), quiet=True).fit()


@pytest.mark.slow
def test_task_hook_on_several_processes(tmp_path, asked):
    text = [*options(tmp_path), *asked, "eval.tasks_every=4"]
    many([*text, f"out={tmp_path / 'one'}"])
    together(2, tmp_path / "ranks", many, [*text, f"out={tmp_path / 'two'}", "parallel.dp_shard=2"])
    assert scored(tmp_path / "two").keys() == {0, 4}
    assert scored(tmp_path / "two")[0] == scored(tmp_path / "one")[0]


def test_task_hook_errors_are_one_line(tmp_path, asked):
    config = load_config(overrides=["eval.tasks_every=2"])
    with pytest.raises(ValueError, match="there are no tasks: name them"):
        TaskHook(config)
    with pytest.raises(ValueError, match="lost cannot be loaded"):
        TaskHook(load_config(overrides=[*asked, "eval.tasks=lost"]))
