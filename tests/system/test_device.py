"""Devices: the time that a measurement of FLOP/s may take."""

import pytest
import torch

from neox.system import device


@pytest.mark.parametrize(
    ("rate", "sizes"), [(1e9, [128]), (4e11, [128, 512, 1024, 2048]), (4e13, [128, 512, 1024, 2048, 8192])]
)
def test_measuring_a_product_takes_its_time_however_slow_it_is(
    rate: float, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that only products move, at `rate` FLOP/s: what is measured is the rate, within the time."""
    now = 0.0
    seen: list[int] = []

    class Matrix:
        def __init__(self, n: int, _: int, **__: object) -> None:
            self.n = n
            seen.append(n)

        def __matmul__(self, other: "Matrix") -> torch.Tensor:
            nonlocal now
            now += 2 * self.n**3 / rate
            return torch.zeros(1, 1)

    monkeypatch.setattr(device.torch, "randn", Matrix)
    monkeypatch.setattr(device.time, "perf_counter", lambda: now)
    assert device.matmul_flops.__wrapped__(torch.device("cpu"), "fp32", 0.5) == pytest.approx(rate)
    assert sorted(set(seen)) == sizes
    assert now <= 0.5 * 1.3


def test_only_floating_types_of_16_bits_and_more_hold_weights():
    for name, expected in {
        "fp32": torch.float32, "float32": torch.float32, "float": torch.float32, "bf16": torch.bfloat16,
        "bfloat16": torch.bfloat16, "fp16": torch.float16, "half": torch.float16, "float64": torch.float64,
    }.items():  # fmt: skip
        assert device.resolve_dtype(name) == device.resolve_dtype(expected) == expected, name
    for wrong in ("int8", "uint8", "long", "bool", "complex64", "float8_e4m3fn", "qint8", "nn", "FP32", "", torch.int8):
        with pytest.raises(ValueError, match=r"holds no weights: choose one of fp32, bf16, fp16") as caught:
            device.resolve_dtype(wrong)
        assert "\n" not in str(caught.value), wrong
