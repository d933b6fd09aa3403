"""The native passes over pieces of similarities to banks, against the divergence of whole rows."""

import pytest
import torch
from inputs import normal

from icsd.ops.registry import get
from icsd.ops.row_sums import Buffers, row_sums

TEMPERATURES = (0.04, 0.05)


def exponents(dtype, temperatures):
    """Return exponents (2, 3, 41) of student and teacher, the largest of a row at its end, a row with a NaN."""
    x, y = (torch.tanh(normal(2, 3, 41, seed=k, dtype=torch.float64)) for k in range(2))
    x[..., -1], y[..., -2] = 1, 1
    y[1, 2, 5] = torch.nan
    return [(z / t).to(dtype) for z, t in zip((x, y), temperatures, strict=True)]


def in_pieces(x, y):
    """Return copies of 23 columns, of one, and of the other 17: as the passes find them in their buffers."""
    return list(zip(*([piece.contiguous() for piece in z.clone().split([23, 1, 17], -1)] for z in (x, y)), strict=True))


@pytest.mark.parametrize("passes", [None, get("cpu").bank_passes], ids=["pytorch", "native"])
@pytest.mark.parametrize("temperatures", [TEMPERATURES, (0.005, 0.01)], ids=["small exponents", "large exponents"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_and_gradients_of_rows_in_pieces(dtype, temperatures, passes):
    x, y = exponents(dtype, temperatures)
    exact = [z.double().clone().requires_grad_() for z in (x, y)]
    log_p, log_q = (z.log_softmax(-1) for z in exact)
    rows = (log_q.exp() * (log_q - log_p)).sum(-1, keepdim=True)
    expected = torch.autograd.grad(rows[~rows.isnan()].sum(), exact)

    like, pieces = x.new_zeros(2, 3, 1), in_pieces(x, y)
    sums = row_sums([like, like], temperatures, False, Buffers(like), passes)
    for piece in pieces:
        sums.add(piece, None)
    value = sums.weighted / sums.totals[1] + (sums.totals[0] / sums.totals[1]).log()
    tolerance = {"rtol": 1e-5 if dtype == torch.float32 else 1e-12, "atol": 1e-5 if dtype == torch.float32 else 1e-12}
    torch.testing.assert_close(value.double(), rows.detach(), equal_nan=True, **tolerance)
    for z, top, exponentials in zip((x, y), sums.top, pieces[-1], strict=True):
        torch.testing.assert_close(exponentials, (z[..., 24:] - top).exp(), equal_nan=True, rtol=1e-6, atol=1e-30)
    assert all((top == 0).all() for top in sums.top) == (temperatures == TEMPERATURES)

    gradients = zip(*([z.clone() for z in sums.gradients(piece, (2, -3))] for piece in in_pieces(x, y)), strict=True)
    finite = ~rows.isnan().expand_as(x)
    for got, want, factor in zip(gradients, expected, (2, -3), strict=True):
        got = torch.cat([*got], -1)
        torch.testing.assert_close(got.double()[finite], factor * want[finite], **tolerance)
        assert got[~finite].isnan().all()


@pytest.mark.parametrize(
    ("match", "change"),
    [
        ("rows must have 5 numbers", {"rows": torch.zeros(4, 6)}),
        ("student must have 28 elements, got 21", {"student": torch.zeros(3, 7)}),
        ("teacher must have 28 elements, got 32", {"teacher": torch.zeros(4, 8)}),
        ("teacher is not of the compute type", {"teacher": torch.zeros(4, 7, dtype=torch.float64)}),
        ("student is not contiguous", {"student": torch.zeros(7, 4).mT}),
        ("exponents must be float32", {"student": torch.zeros(4, 7, dtype=torch.int32)}),
    ],
)
def test_bad_arguments(match, change):
    arguments = {"student": torch.zeros(4, 7), "teacher": torch.zeros(4, 7), "rows": torch.zeros(4, 5)} | change
    with pytest.raises(ValueError, match=match):
        get("cpu").bank_passes.add_exponentials(**arguments, rising=False)
    with pytest.raises(ValueError, match=match):
        get("cpu").bank_passes.exponent_gradients(**arguments, student_factor=1, teacher_factor=1)
