"""Naive generation, the oracle of the engine: a full forward pass for each token."""

from collections.abc import Sequence

import torch

from neox.generate.sampling import Sampler, Sampling
from neox.model.decoder import GPTNeoX
from neox.tokenizer import Tokenizer


@torch.inference_mode()
def naive_generate(
    model: GPTNeoX,
    prompt: Sequence[int],
    sampling: Sampling,
    num_real_tokens: int | None = None,
    eod: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> list[int]:
    """Generate tokens after `prompt`, up to max_tokens, the context's end, `eod` or a stop token.

    It ignores stop strings.
    """
    sampler = Sampler(sampling, num_real_tokens or model.config.vocab_size, prompt, tokenizer)
    device = next(model.parameters()).device
    tokens = list(prompt)
    limit = min(len(tokens) + sampling.max_tokens, model.config.max_position_embeddings)
    while len(tokens) < limit:
        token = sampler(model(torch.tensor([tokens], device=device))[0, -1])
        if sampling.finish_reason(token, eod):
            break
        tokens.append(token)
    return tokens[len(prompt) :]
