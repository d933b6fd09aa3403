"""Compensated sums of float32 numbers keep the bound that their source states; squared norms are as float64's."""

import math
import platform
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from harness import load, pointer

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator is written for x86-64")


@pytest.fixture(scope="module")
def sums():
    return load(Path(__file__).with_name("compensated_sums.cu"))


def exactly(numbers) -> Fraction:
    return sum(map(Fraction, numbers))


def sum_of(sums, x) -> float:
    out = torch.zeros((), dtype=torch.float64)
    sums.sum_of(pointer(x), len(x), pointer(out))
    return out.item()


# Numbers of one size, of any size, that cancel, and that are much larger than the sum so far.
@pytest.mark.parametrize("make", ["alike", "any size", "cancelling", "growing"])
@pytest.mark.parametrize("n", [7, 100, 3001])
def test_sums_keep_their_bound(make, n, sums):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, generator=generator)
    if make == "alike":
        x = 1 + x.abs() / 1000
    elif make == "any size":
        x *= torch.randint(-20, 20, (n,), generator=generator).float().exp2()
    elif make == "cancelling":
        x = torch.cat([x[: n // 2], 1e-5 * torch.ones(1), -x[: n // 2]])
    else:
        x *= torch.arange(n).float().div(n / 30).exp2()
    exact, size = exactly(x.tolist()), exactly(x.abs().tolist())
    bound = (len(x) * Fraction(2) ** -24) ** 2 * size + abs(exact) * Fraction(2) ** -52
    assert abs(Fraction(sum_of(sums, x)) - exact) <= bound


def test_float32_sums_do_not_keep_the_bound():
    x = 1 + torch.randn(100, generator=torch.Generator().manual_seed(100)).abs() / 1000
    total = torch.zeros(())
    for element in x:
        total = total + element
    assert abs(Fraction(total.item()) - exactly(x.tolist())) > (100 * Fraction(2) ** -24) ** 2 * exactly(x.tolist())


# Scales at which squares underflow in float32, partly or all of them, and overflow.
SCALES = [1.0, 1e-10, 1e-17, 1e-21, 1e-37, 1e15, 1e18, 1e19, 1e25]


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(dtype, scale) for dtype in ("float", "bfloat16") for scale in SCALES] + [("half", 1e-3), ("half", 1e3)],
)
def test_squared_norms_are_as_accurate_as_float64(dtype, scale, sums):
    generator = torch.Generator().manual_seed(1)
    for dim in (1, 31, 130, 1000):
        x = scale * torch.randn(dim, generator=generator) * torch.rand(dim, generator=generator) ** 20
        x = x.to({"float": torch.float32}.get(dtype) or getattr(torch, dtype))
        out = torch.zeros((), dtype=torch.float64)
        getattr(sums, f"square_of_{dtype}")(pointer(x), dim, pointer(out))
        exact = float(sum(Fraction(element) ** 2 for element in x.double().tolist()))
        additions = 2 * (dim / 32 + 6)  # of a lane: squares, their errors and the sums of other lanes
        assert out.item() == pytest.approx(exact, rel=(additions * 2.0**-24) ** 2, abs=0)


def test_squared_norms_of_what_is_not_finite(sums):
    for value, expected in ((math.inf, math.inf), (math.nan, math.nan), (0.0, 0.0)):
        x = torch.full((40,), value)
        out = torch.zeros((), dtype=torch.float64)
        sums.square_of_float(pointer(x), 40, pointer(out))
        assert out.item() == expected or (math.isnan(expected) and math.isnan(out.item()))
