"""Generation by two processes with half of each matrix: what one process generates and scores."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import neox
from neox.generate import Engine, Sampling, prompt_lookup
from neox.generate.loading import shared_engine
from neox.model.cache import BLOCK, KVPool
from neox.system.processes import OtherProcessFailed
from tests.generate.conftest import random_model, small_tokenizer
from tests.parallel.helpers import together
from tests.tiny import GPT_J, GPT_NEO
from tests.train.helpers import ROOT

FAMILIES = {"gpt_neox": {}, "gptj": GPT_J, "gpt_neo": GPT_NEO}
BLOCKS = 4
SAMPLING = Sampling(max_tokens=14, temperature=0.8, stop_at_eod=False, logprobs=0, echo=True, stop=("zz",))
COMMON = list(range(40, 62))
PROMPTS = ["naïve café 🙂🙃 the quick the quick", "", *([*COMMON, i, 9] for i in range(4)), "fox " * 9]


def work(engine: Engine) -> tuple:
    """What is done with an engine: more than its memory holds, some of it left before its end, and scores."""
    given = [SAMPLING.replace(seed=number, temperature=0.8 * (number % 2)) for number in range(len(PROMPTS))]
    done = engine.generate(PROMPTS, given)
    for _ in zip(range(3), engine.events(PROMPTS, SAMPLING), strict=False):
        pass
    again = [engine.generate([[*COMMON, 0, last]], SAMPLING.replace(echo=False))[0] for last in (9, 3)]
    scores = engine.score([([5, 6, 7] * 7, [8, 9]), ([5, 6, 7] * 7, [1]), ([3], [4, 5])])
    tokens = [one.tokens for one in (*done, *again)]
    logprobs = [record.logprob for one in (*done, *again) for record in one.logprobs if record.logprob]
    return tokens, logprobs + [value for score in scores for value in score.logprobs], engine.stats


def cache_bytes(model, heads: int) -> int:
    return BLOCKS * KVPool.block_bytes(model.config, torch.float32, heads)


def two(folder: Path) -> dict[str, tuple]:
    """On each rank: what `work` found, on rank 0."""
    found = {}
    for family in FAMILIES:
        model = random_model(vocab_size=2 * small_tokenizer().vocab_size, **FAMILIES[family])
        options = {"slots": 3, "cache_bytes": cache_bytes(model, model.heads // 2), "speculate": "prompt"}
        with shared_engine(folder / family, 2, "cpu", **options) as engine:
            assert (engine is None) == bool(dist.get_rank())
            if engine is not None:
                assert engine._pool.keys.shape[1] == engine.model.heads == model.heads // 2
                share = sum(p.numel() for p in engine.model.parameters()) / sum(p.numel() for p in model.parameters())
                assert share < 0.6
                found[family] = work(engine)
    for tp, options, message in (
        (3, {}, "parallel.tp=3 is 3 processes, 2 run: start as many with torchrun, or change parallel"),
        (2, {"weights": "int8"}, "parallel.tp: does not go with draft=, nor with packed weights: leave them out"),
    ):
        expected, match = (OtherProcessFailed, "rank 0") if dist.get_rank() else (ValueError, message)
        with pytest.raises(expected, match=match), shared_engine(folder / "gpt_neox", tp, "cpu", **options):
            pass
    return found


def test_two_processes_generate_and_score_as_one(tmp_path):
    alone = {}
    for family, flags in FAMILIES.items():
        model = random_model(vocab_size=2 * small_tokenizer().vocab_size, **flags)
        neox.save(model, tmp_path / family, small_tokenizer())
        engine = Engine(model, small_tokenizer(), 3, cache_bytes(model, model.heads), drafter=prompt_lookup)
        alone[family] = work(engine)
    found, nothing = together(2, tmp_path / "ranks", two, tmp_path)
    assert nothing == {}
    for family, (tokens, logprobs, stats) in alone.items():
        assert found[family][0] == tokens
        assert found[family][1] == pytest.approx(logprobs, abs=1e-5)
        assert found[family][2] == stats
        assert min(stats.hits % BLOCK, stats.evictions, stats.accepted) > 0  # copied, cleared, verified


@pytest.mark.slow
@pytest.mark.parametrize("starter", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]])
def test_the_verb_by_itself_and_under_torchrun(tmp_path, starter):
    model = random_model(vocab_size=2 * small_tokenizer().vocab_size)
    neox.save(model, tmp_path / "hf", small_tokenizer())
    asked = ["-m", "neox", "generate", str(tmp_path / "hf"), "prompt=-", "max_tokens=9", "n=2", "device=cpu"]

    def run(*arguments: str) -> subprocess.CompletedProcess:
        environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), GLOO_SOCKET_IFNAME="lo")
        return subprocess.run(
            [sys.executable, *arguments], env=environment, input="the quick", capture_output=True, text=True
        )

    alone, both = run(*asked), run(*starter, *asked, "parallel.tp=2")
    assert both.returncode == 0, both.stderr
    assert both.stdout == alone.stdout
    assert "the quick" in both.stdout
    wrong = run(*starter, *asked, "parallel.tp=2", "weights=int8")
    assert wrong.returncode != 0
    assert wrong.stderr.count("neox: error: parallel.tp: does not go with draft=, nor with packed weights") == 1
