"""The peer of several benchmarks: transformers' model of a shape of ours, as a converted checkpoint would have it."""


def gpt_neox(shape, **options):
    """GPTNeoXForCausalLM of a ModelConfig, random weights in torch's default type; `options` are its config's."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from neox.checkpoint.families import write_config

    written = write_config(shape, torch.get_default_dtype(), None)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**{**written, "attn_implementation": "sdpa", **options}))
