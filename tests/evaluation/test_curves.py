"""Checkpoints of a run evaluated one after the other: each as by itself, each once, and drawn."""

import json
import re
import shutil
import threading
import time

import lm_eval.evaluator
import pytest

import neox
from neox import cli
from neox.config import load_config
from neox.evaluation import curves
from neox.evaluation.adapter import EngineLM
from neox.train import Trainer
from tests.evaluation.helpers import write_tasks
from tests.train.helpers import TINY

STEPS = (0, 1, 2, 4)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("own") / "tasks")


@pytest.fixture(autouse=True)
def _unsaid(monkeypatch):
    """What lm-eval tells of the machine takes it longer than these evaluations."""
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: results.update(lm_eval_version="0"))


def options(folder):
    text = folder / "a.txt"
    text.write_text("".join(f"{i} + {i} = {2 * i}\n" for i in range(400)))
    tokens = ("model.vocab_size=300", "tokenizer.vocab_size=290", "seq_length=64", f"data.train={text}")
    return (*TINY, *tokens, "schedule.warmup=0", "optim.lr=1e-2", "checkpoint.early=4", "checkpoint.every=4", "steps=4")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    config = load_config(overrides=[*options(folder), f"out={folder / 'run'}"])
    assert Trainer(config, quiet=True).fit().finished
    return folder / "run"


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    counts: list[int] = []
    plain = EngineLM.loglikelihood
    monkeypatch.setattr(
        EngineLM, "loglikelihood", lambda self, requests: counts.append(len(requests)) or plain(self, requests)
    )
    return counts


def test_each_checkpoint_is_evaluated_as_by_itself_once_and_drawn(run, tasks, tmp_path, capsys, asked, monkeypatch):
    drawn, plain = [], curves.figure
    monkeypatch.setattr(curves, "figure", lambda found: drawn.append(len(found["sums_choose acc"])) or plain(found))
    command = ["eval", str(run), "tasks=sums_choose", f"include_path={tasks}", f"out={tmp_path / 'out'}"]
    assert cli.main([*command, "steps=0,2"]) == 0
    assert asked == [48, 48]
    assert drawn == [1, 2]
    assert cli.main([*command, "steps=all"]) == 0
    assert asked == [48] * 4, "what was there was asked again"
    assert drawn == [1, 2, 3, 4], "what was there was drawn again"
    found = json.loads((tmp_path / "out" / "curves.json").read_text())
    assert found.keys() == {"sums_choose acc"}
    curve = found["sums_choose acc"]
    assert curve["step"] == list(STEPS)
    for step, value, error in zip(*curve.values(), strict=True):
        alone = neox.evaluate(run / f"step_{step:08d}", "sums_choose", include_path=str(tasks), progress=False)
        row = alone["results"]["sums_choose"]
        assert (value, error) == (row["acc,none"], row["acc_stderr,none"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2].startswith("sums_choose acc: 0: 0.")
    assert (tmp_path / "out" / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page = (tmp_path / "out" / "curves.html").read_text()
    table = [re.findall(r"<td>(.*?)</td>", line) for line in page.splitlines() if "<td>" in line]
    shown = [f"{value:.4f} ± {error:.4f}" for value, error in zip(curve["value"], curve["stderr"], strict=True)]
    assert table == [[str(step), cell] for step, cell in zip(STEPS, shown, strict=True)]
    # Another number of documents is another question.
    assert cli.main([*command, "steps=2", "limit=3"]) == 0
    assert json.loads((tmp_path / "out" / "step_00000002" / "results.json").read_text())["config"]["limit"] == 3


def test_cached_results_are_those_of_the_same_weights_and_documents(tasks, tmp_path, asked):
    """A run deleted and trained anew at the same path, edited task data, and edited few-shot examples."""
    own = tmp_path / "tasks"
    shutil.copytree(tasks, own)
    for path in own.glob("*.yaml"):
        path.write_text(path.read_text().replace(str(tasks), str(own)))
    said = {}
    command = ["eval", str(tmp_path / "run"), "tasks=sums_choose", f"include_path={own}", f"out={tmp_path / 'out'}"]

    def evaluated() -> list[float]:
        assert cli.main([*command, "steps=2,4"]) == 0
        return json.loads((tmp_path / "out" / "curves.json").read_text())["sums_choose acc"]["value"]

    for seed in (1, 2):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        overrides = [*options(tmp_path), f"out={tmp_path / 'run'}", f"train.seed={seed}"]
        assert Trainer(load_config(overrides=overrides), quiet=True).fit().finished
        asked.clear()
        said[seed] = evaluated()
        assert asked == [48, 48], seed
        evaluated()
        assert asked == [48, 48], "asked again without a change"
        for step in (2, 4):
            alone = neox.evaluate(
                tmp_path / "run" / f"step_{step:08d}", "sums_choose", include_path=str(own), progress=False
            )
            assert alone["results"]["sums_choose"]["acc,none"] == said[seed][[2, 4].index(step)]
    asked.clear()
    data = own / "sums.jsonl"
    data.write_text(data.read_text().replace('"answer": 0', '"answer": 1'))
    evaluated()
    assert len(asked) == 2


def test_the_picture_shows_the_points(run):
    points = [(0, 0.25, 0.1), (10, 0.5, 0.2), (1000, 0.75, None)]
    (axes,) = curves.figure({"a acc": points}).axes
    (line,) = axes.lines
    assert [tuple(point) for point in line.get_xydata()] == [point[:2] for point in points]
    band = axes.collections[0].get_paths()[0].vertices
    assert {tuple(corner) for corner in band} >= {(10, 0.3), (10, 0.7), (1000, 0.75)}
    assert axes.get_xscale() == "symlog"
    assert len(curves.figure({f"{n} acc": points[:2] for n in range(4)}).axes) == 4


def test_watch_follows_checkpoints_to_the_end_of_the_run(run, tmp_path):
    """Checkpoints that come while one looks, the newest first; what was overtaken is not looked for."""
    live = tmp_path / "live"
    live.mkdir()
    shutil.copy(run / "config.toml", live)
    shutil.copytree(run / "step_00000000", live / "step_00000000")
    looked = curves.follow_checkpoints(str(live), every=0.01)
    assert next(looked)[0] == 0

    def go_on():
        time.sleep(0.1)
        for step in (1, 2, 4):
            shutil.copytree(run / f"step_{step:08d}", tmp_path / "copy")
            (tmp_path / "copy").rename(live / f"step_{step:08d}")

    later = threading.Thread(target=go_on)
    later.start()
    steps = [step for step, _ in looked]
    later.join()
    assert steps[-1] == 4 or 4 in steps
    assert set(steps) <= {1, 2, 4}
    assert len(steps) == len(set(steps))


def test_a_damaged_checkpoint_is_skipped(run, tasks, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (shard,) = (copy / "step_00000001").glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:-100])
    found = curves.evaluate_steps(
        curves.checkpoints(str(copy), [1, 2]),
        tmp_path / "out",
        tasks="sums_choose",
        include_path=str(tasks),
        progress=False,
    )
    assert [step for step, *_ in found["sums_choose acc"]] == [2]
    assert "step 1 is skipped" in capsys.readouterr().err


def test_selection_of_checkpoints(run, tmp_path):
    assert [step for step, _ in curves.checkpoints(str(run), None)] == list(STEPS)
    assert curves.checkpoints("A/b", [3, 1, 3]) == [(1, "A/b@step1"), (3, "A/b@step3")]
    with pytest.raises(ValueError, match="has no step 3; it has 0, 1, 2, 4"):
        curves.checkpoints(str(run), [2, 3])
    with pytest.raises(ValueError, match="of a hub id name the steps"):
        curves.checkpoints("A/b", None)
    with pytest.raises(ValueError, match=r"holds no run \(no config.toml\)"):
        next(curves.follow_checkpoints(str(tmp_path)))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("steps=some", "must be all, or steps as 1000,2000"),
        ("watch=true steps=all", "not both"),
    ],
)
def test_eval_steps_wrong_commands(wrong, said, capsys):
    assert cli.main(["eval", "runs/x", "tasks=sums", *wrong.split()]) == 2
    assert said in capsys.readouterr().err


def test_watch_is_true_or_false(capsys):
    assert cli.main(["eval", "runs/x", "tasks=sums", "watch=1"]) == 1
    assert "watch: must be a valid boolean, got 1 (from watch=1)" in capsys.readouterr().err
