import pytest
import torch

from neox.config import ModelConfig
from neox.model import GPTNeoX


def random_model(**options) -> GPTNeoX:
    """A tiny model whose logits are far enough apart that greedy choices are not ties."""
    shape = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = GPTNeoX(ModelConfig(**{**shape, "max_position_embeddings": 64, "rotary_pct": 0.5, **options}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model() -> GPTNeoX:
    return random_model()
