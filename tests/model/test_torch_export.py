"""`torch.export` takes the model as it is: parameter names stay, logits are the model's own."""

import pytest
import torch

from tests.tiny import GPT_J, GPT_NEO, ours, tokens


@torch.no_grad()
@pytest.mark.parametrize("flags", [{}, GPT_J, GPT_NEO], ids=["neox", "gpt-j", "gpt-neo"])
def test_an_exported_program_gives_the_models_logits(flags):
    model = ours(**flags).eval()
    ids = tokens(2, 12)
    program = torch.export.export(model, (ids,))
    assert program.state_dict.keys() == model.state_dict().keys()
    assert torch.equal(program.module()(ids), model(ids))
    # A sequence within a local window has no mask of its own: another program.
    batch, time = torch.export.Dim("batch", max=8), torch.export.Dim("time", min=6, max=32)
    dynamic = torch.export.export(model, (ids,), dynamic_shapes={"tokens": {0: batch, 1: time}})
    other = tokens(3, 20)
    torch.testing.assert_close(dynamic.module()(other), model(other), rtol=1e-5, atol=1e-5)
