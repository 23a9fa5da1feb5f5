import pytest

from neox.tokenizer import Tokenizer, train_bpe


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """300 ids by the recipe of the 20B tokenizer."""
    return train_bpe(
        ["the cat sat on the mat; the dog ate the hat.  def f(x):\n    return x\n"] * 4, 300, progress=False
    )
