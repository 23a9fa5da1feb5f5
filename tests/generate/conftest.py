import copy
from functools import cache

import pytest
import torch

from neox.config import ModelConfig
from neox.generate import Engine
from neox.model.decoder import GPTNeoX
from neox.quantization import kernels
from neox.quantization.kernels import native
from neox.quantization.packed import quantize
from neox.tokenizer import Tokenizer, train_bpe


def random_model(**options) -> GPTNeoX:
    """A tiny model whose logits are far enough apart that greedy choices are not ties."""
    shape = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = GPTNeoX(ModelConfig(**{**shape, "max_position_embeddings": 64, "rotary_pct": 0.5, **options}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


@cache
def small_tokenizer() -> Tokenizer:
    return train_bpe(["naïve café 🙂🙃 the quick brown fox 東京\n" * 20], 400, progress=False)


needs_kernels = pytest.mark.skipif(native.target() is None, reason="a processor that the kernels are not for")


def packed(model: GPTNeoX, kind: kernels.Kind = "fp32") -> GPTNeoX:
    """A packed copy, as the verbs load a model on a CPU: its results do not depend on the batch."""
    return quantize(copy.deepcopy(model), kind)


def random_engine(slots: int = 3, pack: bool = False, **options) -> Engine:
    """A tiny model with a tokenizer, and as many padding rows again as there are tokens."""
    tokenizer = small_tokenizer()
    model = random_model(vocab_size=2 * tokenizer.vocab_size, **options)
    return Engine(packed(model) if pack else model, tokenizer, slots=slots)


@pytest.fixture(scope="module")
def model() -> GPTNeoX:
    return random_model()


@pytest.fixture(scope="session")
def trained_tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture(scope="module")
def engine() -> Engine:
    return random_engine()


@pytest.fixture(scope="module")
def packed_engine() -> Engine:
    return random_engine(pack=True)
