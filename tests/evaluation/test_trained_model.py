"""Log-likelihoods of a trained model on the default path, 4,800 requests as evaluation asks them.

A trained model's distributions are sharp, so that errors of the exponential and of GELU show, which a random model's
near-uniform ones hide.
"""

import random
from pathlib import Path

import pytest
from lm_eval.api.instance import Instance

import neox
from neox.config import load_config
from neox.evaluation import EngineLM
from neox.generate.loading import load_engine
from tests.evaluation.conftest import hf_backend

ROOT = Path(__file__).resolve().parents[2]


def trained(folder: Path) -> tuple[Path, str]:
    """A Hugging Face folder of a model trained on the guides, and their text."""
    text = "".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
    (folder / "text.txt").write_text(text)
    shape = ["hidden_size=192", "num_hidden_layers=6", "num_attention_heads=4", "max_position_embeddings=256"]
    options = [f"data.train={folder / 'text.txt'}", "seq_length=256", "micro_batch_size=4", "global_batch_size=4"]
    options += ["model.vocab_size=1024", "tokenizer.vocab_size=1024", "lr=3e-3", f"log.out={folder / 'run'}"]
    config = load_config(overrides=[*(f"model.{one}" for one in shape), *options, "steps=150"])
    neox.Trainer(config).fit()
    neox.save(*neox.load(folder / "run")[:1], folder / "hf", neox.load(folder / "run")[1])
    return folder / "hf", text


def requests(text: str, count: int) -> list[Instance]:
    """Choices after a context, last words of a passage, and long continuations."""
    draw, made = random.Random(0), []
    for number in range(count):
        start = draw.randrange(len(text) - 600)
        context = text[start : start + draw.randrange(20, 300)]
        length = (8, 3, 40, 200)[number % 4] + draw.randrange(8)
        at = draw.randrange(len(text) - 600) if number % 2 else start + len(context)
        continuation = " " + text[at : at + length].strip() + "."
        made.append(Instance("loglikelihood", {}, (context.strip(), continuation), number))
    return made


@pytest.mark.slow
def test_log_likelihoods_of_a_trained_model_are_those_of_hf(tmp_path: Path) -> None:
    """Within 1e-4, or 1e-6 relative where that is more; nothing is left out."""
    folder, text = trained(tmp_path)
    asked = requests(text, 4800)
    ours = EngineLM(load_engine(folder, "cpu"), progress=False).loglikelihood(asked)
    theirs = hf_backend(folder, batch_size=16).loglikelihood(asked, disable_tqdm=True)
    errors = [
        (abs(mine - other) / max(1e-4, 1e-6 * abs(other)), abs(mine - other), other)
        for (mine, _), (other, _) in zip(ours, theirs, strict=True)
    ]
    print(f"worst: {max(errors)}; over: {sum(share > 1 for share, _, _ in errors)} of {len(errors)}")
    assert max(errors)[0] <= 1, max(errors)
    # Right code comes to 2.4e-7 relative; an exponential that erred by 48 ulp at -1 came to 7.8e-7, within the claim.
    relative = max(error / abs(other) for _, error, other in errors)
    assert relative <= 4e-7, relative
    assert sum(mine != other for (_, mine), (_, other) in zip(ours, theirs, strict=True)) == 0
