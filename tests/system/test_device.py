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
