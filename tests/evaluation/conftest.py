"""A tiny random model that `transformers` saved, with a real byte-level tokenizer, and lm-eval's hf backend on it."""

import os

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch

pytest.importorskip("lm_eval")

from pathlib import Path

from lm_eval.models.huggingface import HFLM

from neox.evaluation import EngineLM
from neox.generate.loading import load_engine
from neox.tokenizer import Tokenizer, train_bpe
from tests import tiny

CONTEXT = 64
TEXT = "Where is the naïve café? 🙂🙃 In 東京, said the quick brown fox; 12 + 7 = 19.\nThe answer is: yes.\n\n"


def save_model(
    folder: Path,
    tokenizer: Tokenizer,
    kind: str = "gpt_neox",
    context: int = CONTEXT,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A random model of `transformers`, a few padding rows wider than its tokenizer, as `transformers` saves both."""
    import transformers

    length = "n_positions" if kind == "gptj" else "max_position_embeddings"
    shape = {"vocab_size": tokenizer.vocab_size + 7, length: context}
    tiny.theirs(kind, **shape).to(dtype).save_pretrained(folder)
    tokenizer.save(folder)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_bpe([TEXT * 20], 420, progress=False)


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tokenizer) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny", tokenizer)


def hf_backend(folder: Path, **options) -> HFLM:
    """lm-eval's own backend, in float32 throughout, with the plainest attention."""
    plain = {"dtype": "float32", "softmax_dtype": "float32", "attn_implementation": "eager"}
    return HFLM(str(folder), device="cpu", **({"batch_size": 4} | plain | options))


@pytest.fixture(scope="session")
def theirs(folder) -> HFLM:
    return hf_backend(folder)


@pytest.fixture(scope="session")
def ours(folder) -> EngineLM:
    return EngineLM(load_engine(folder, "cpu"), progress=False)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
