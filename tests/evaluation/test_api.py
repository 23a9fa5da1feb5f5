"""lm-eval's own client of OpenAI-compatible APIs, on a small local one that answers with our engine."""

import json
import threading
from collections.abc import Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import lm_eval.evaluator
import pytest

import neox
from neox import cli
from neox.generate import Sampling
from tests.evaluation.conftest import CONTEXT
from tests.evaluation.helpers import close, write_tasks

pytest.importorskip("tenacity", reason="lm-eval's API backends need it: pip install 'neox-lm[eval]'")


def completion(engine, asked: dict) -> dict:
    """What /v1/completions answers to lm-eval: text, or with `echo` the log-probabilities of the prompt's tokens."""
    echo = asked.get("echo", False)
    sampling = Sampling(
        max_tokens=asked["max_tokens"],
        temperature=asked["temperature"],
        stop=[stop for stop in asked.get("stop", []) if stop],
        stop_at_eod=not echo,  # lm-eval leaves one token off the end, whichever it is
        logprobs=asked.get("logprobs"),
        prompt_logprobs=1 if echo else None,
    )
    choices = []
    for index, done in enumerate(engine.generate(asked["prompt"], sampling)):
        choice = {"index": index, "text": done.text, "finish_reason": done.finish_reason}
        if echo:
            tokens = [*done.prompt_logprobs, *done.logprobs]
            choice["logprobs"] = {
                "token_logprobs": [None, *(token.logprob for token in tokens)],
                "top_logprobs": [None, *({str(top): logprob for top, logprob in token.top} for token in tokens)],
            }
        choices.append(choice)
    return {"choices": choices}


@contextmanager
def serving(engine, patience: Sequence[int] = ()):
    """A local API; yields its address and the requests that it answered: after as many as `patience` says, 500."""
    answered: list[dict] = []
    one_at_a_time = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            dead = self.path != "/v1/completions" or any(len(answered) >= limit for limit in patience)
            with one_at_a_time:
                body = b"gone" if dead else json.dumps(completion(engine, asked)).encode()
            if not dead:
                answered.append(asked)
            self.send_response(500 if dead else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.send_error(404)  # no tokenizer of its own: lm-eval takes the one that it is given

        def log_message(self, *arguments) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/completions", answered
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def command(folder, tmp_path, monkeypatch):
    """neox eval lm-eval:local-completions on that API, as key=value options."""
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: results.update(lm_eval_version="0"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    tasks = write_tasks(tmp_path / "tasks", count=5)

    def options(address: str) -> list[str]:
        # Its max_length counts the token that it always asks for: one more gives it the whole context.
        arguments = f"model=tiny,base_url={address},tokenizer={folder},max_length={CONTEXT},max_retries=1"
        return ["lm-eval:local-completions", f"include_path={tasks}", f"model_args={arguments}", "batch_size=1"]

    return options


@pytest.mark.parametrize("at_once", [1, 3])
def test_an_api_scores_and_writes_as_the_model_behind_it(ours, command, tmp_path, at_once):
    names, out = "sums_choose,sums_write,sums_read", tmp_path / "out"
    with serving(ours.engine) as (address, answered):
        target, include, arguments, *rest = command(address)
        arguments += f",num_concurrent={at_once}"
        asked = ["eval", target, f"tasks={names}", include, arguments, *rest, f"out={out}", "log_samples=true"]
        assert cli.main(asked) == 0
    results = json.loads((out / "results.json").read_text())
    tasks = include.partition("=")[2]
    alone = neox.evaluate(ours.engine, names, include_path=tasks, log_samples=True, progress=False)
    assert close(results["results"], alone["results"])
    assert results["config"]["model"] == "local-completions"
    scored = [request for request in answered if request.get("echo")]
    assert len(scored) == 5 * 4 + 5
    chosen = [json.loads(line) for line in (out / "samples_sums_choose.jsonl").read_text().splitlines()]
    for theirs, mine in zip(chosen, alone["samples"]["sums_choose"], strict=True):
        for [[logprob, greedy]], [[our_logprob, our_greedy]] in zip(theirs["resps"], mine["resps"], strict=True):
            assert float(logprob) == pytest.approx(our_logprob, abs=1e-4)
            assert greedy == str(our_greedy)
    written = [json.loads(line) for line in (out / "samples_sums_write.jsonl").read_text().splitlines()]
    assert [one["resps"] for one in written] == [one["resps"] for one in alone["samples"]["sums_write"]]


def test_an_api_that_fails_leaves_its_answers_cached(ours, command, tmp_path, capsys):
    out = tmp_path / "out"
    with serving(ours.engine, patience := [7]) as (address, answered):
        asked = ["eval", *command(address), "tasks=sums_choose", f"out={out}"]
        assert cli.main(asked) == 1
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert "neox: error: lm-eval:local-completions: failed: 500 " in line
        assert f"{out / 'answers.jsonl'} keeps the answers so far" in line
        assert len(answered) == 7
        patience.clear()  # it lives again
        assert cli.main(asked) == 0
        assert len(answered) == 20
