"""The harness detects the errors that it is for."""

import functools

import pytest
import torch
from harness import SLACK, assert_matches


def double(x):
    return 2 * x


def test_a_correct_operation_passes():
    assert_matches(double, double, {"x": torch.randn(5, requires_grad=True)})
    assert_matches(double, double, {"x": torch.empty(0)})


def test_an_element_that_is_not_written():
    def forgetful(x):
        y = torch.empty_like(x)
        y[:-1] = 2 * x[:-1]
        return y

    with pytest.raises(AssertionError, match="not finite"):
        assert_matches(forgetful, double, {"x": torch.randn(5)})
    with pytest.raises(AssertionError, match="output 0"):
        assert_matches(forgetful, double, {"x": torch.arange(1, 5)})


@pytest.mark.parametrize("place", [-1, 5])
def test_an_element_outside_the_output(place):
    def careless(x):
        y = torch.empty(5)
        y.copy_(2 * x)
        y.as_strided((1,), (1,), y.storage_offset() + place).fill_(7.0)
        return y

    with pytest.raises(AssertionError, match="outside"):
        assert_matches(careless, double, {"x": torch.randn(5)})


def test_an_error_beyond_the_budget():
    def off_by(error):
        return lambda x: (2 * x.double() + error).to(x.dtype)

    x = torch.linspace(0.5, 1.0, 999, dtype=torch.float16)
    rounding = torch.finfo(x.dtype).eps * 2
    assert_matches(off_by(0.5 * rounding), double, {"x": x})
    with pytest.raises(AssertionError, match="largest error"):
        assert_matches(off_by((SLACK + 2) * rounding), double, {"x": x})


def test_a_reference_may_be_exact_by_chance():
    """A sum that cancels is exact for these numbers, and off by 1/32 for some near them."""
    x = torch.tensor([[64.0, 1.0, -64.0]], dtype=torch.float16)

    def total(x):
        return x[:, 0] + x[:, 1] + x[:, 2]

    assert_matches(lambda x: total(x) + 1 / 32, total, {"x": x})
    with pytest.raises(AssertionError, match="largest error"):
        assert_matches(lambda x: total(x) + 1 / 8, total, {"x": x})


def test_observers_get_errors_as_shares_of_the_budget(monkeypatch):
    told = []
    monkeypatch.setattr("harness.observers", [lambda *comparison: told.append(comparison)])
    x = torch.linspace(0.5, 1.0, 999, dtype=torch.float16)
    rounding = torch.finfo(x.dtype).eps * 2  # of the largest value; PyTorch is exact here

    def off(x, error=0.5 * rounding):
        return (2 * x.double() + error).to(x.dtype)

    assert_matches(off, double, {"x": x})
    assert_matches(functools.partial(off, error=0.0), double, {"x": x})
    with pytest.raises(AssertionError):
        assert_matches(lambda x: off(x, 3 * rounding), double, {"x": x})
    assert [entry[:3] for entry in told] == [
        (op, torch.float16, "output 0") for op in ("off", "off", "<lambda>")
    ]
    assert [entry[3] for entry in told] == pytest.approx([0.5, 0.0, 3.5])


def test_a_gradient_of_something_else():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, dy):
            return 2 * dy.flip(0)  # correct for a gradient of ones

    with pytest.raises(AssertionError, match="gradient of x"):
        assert_matches(Wrong.apply, double, {"x": torch.randn(5, requires_grad=True)})


def test_another_dtype_or_shape():
    with pytest.raises(AssertionError):
        assert_matches(lambda x: (2 * x).double(), double, {"x": torch.randn(5)})
    with pytest.raises(AssertionError):
        assert_matches(lambda x: (2 * x)[None], double, {"x": torch.randn(5)})
