"""A weight format is one class and one line: loading, the start of a run, and export need nothing else."""

from pathlib import Path

import pytest
import torch

import neox
from neox.checkpoint import convert, formats, load_initial, weights_dtype
from neox.checkpoint.weight_source import WeightSource, slices
from neox.system.processes import Processes
from tests.tiny import GPT_J, ours


class TorchFile(WeightSource):
    """A format of a test's own: one file of torch.save, in float16."""

    def __init__(self, folder: Path) -> None:
        self.content = torch.load(folder / "weights.pt", weights_only=True)
        super().__init__(folder / "weights.pt", neox.ModelConfig.model_validate_json((folder / "shape").read_text()))

    @classmethod
    def matches(cls, folder: Path) -> bool:
        return (folder / "weights.pt").exists()

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16

    def read(self, name, shape=None, offsets=None):
        return self.content[name][slices(self.shapes[name], shape, offsets)]


@pytest.mark.parametrize("flags", [{}, GPT_J], ids=["gpt_neox", "gptj"])
def test_a_weight_format_of_one_class_loads_starts_a_run_and_converts(tmp_path, monkeypatch, flags):
    model = ours(**flags).half()
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save(dict(model.named_parameters()), folder / "weights.pt")
    (folder / "shape").write_text(model.config.model_dump_json())
    with pytest.raises(neox.checkpoint.CheckpointError, match="neither a Hugging Face folder"):
        neox.load(folder)
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, TorchFile))
    assert weights_dtype(folder) == torch.float16
    expected = {name: parameter.float() for name, parameter in model.named_parameters()}
    begun = ours(seed=1, **flags)
    load_initial(str(folder), [begun], Processes())
    assert convert(folder, tmp_path / "hf") == sum(value.numel() for value in expected.values())
    for what, loaded in (("load", neox.load(folder)[0]), ("init", begun), ("convert", neox.load(tmp_path / "hf")[0])):
        for name, parameter in loaded.named_parameters():
            assert torch.equal(parameter, expected[name]), f"{what}: {name}"
