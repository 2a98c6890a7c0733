"""Errors of apply_rotary."""

import pytest
import torch
from rotary_inputs import make_inputs

from comemo_kernels import ImageGrids, apply_rotary, reference

pytestmark = pytest.mark.kernel(reference=True)  # its laws are the reference's too


def wrong(device):
    """Invalid arguments and the errors that they give."""
    inputs = make_inputs(N=5, device=device)
    q, k, cos, sin, positions = inputs.values()
    long = ImageGrids.pack([(2, 1)], side=2, device=device)
    return {
        "q of integers": ({"q": q.int()}, r"q must be .* float64, got torch.int32 \(2, 5, 2, 8\)"),
        "q of 2 dimensions": ({"q": q[0, 0]}, r"got torch.float32 \(2, 8\)"),
        "q of float8": ({"q": q.to(torch.float8_e4m3fn)}, "got torch.float8_e4m3fn"),
        "a table of no dimension": ({"cos": cos[0, 0], "sin": sin[0, 0]}, "got 0"),
        "k of other tokens": ({"k": k[:, :4]}, r"\(2, 4, 1, 8\).* for .*\(2, 5, 2, 8\)"),
        "k of another dtype": ({"k": k.half()}, "k must be like q.*float16"),
        "k without a batch": ({"k": k[0]}, r"k must be like q.*\(5, 1, 8\)"),
        "sin of another shape": ({"sin": sin[:3]}, r"one shape.*\(80, 4\).*\(3, 4\)"),
        "a table of integers": (
            {"cos": cos.int(), "sin": sin.int()},
            "one shape and floating dtype",
        ),
        "a table too wide": (
            {"cos": torch.cat([cos, cos], 1), "sin": torch.cat([sin, sin], 1)},
            r"even number of the 8 elements .* got 16: .* pass the first",
        ),
        "ids of other tokens": ({"positions": positions[:, :4]}, r"\[2, 5\].* got .*\[2, 4\]"),
        "ids in a list": ({"positions": [0, 1]}, "a tensor of ids, ImageGrids or None, got list"),
        "ids of floats": ({"positions": positions.float()}, "int32 or int64.*float32"),
        "a table for each token beside ids": (
            {"cos": cos[positions], "sin": sin[positions]},
            r"with positions cos must be \[P, R/2\]",
        ),
        "a table without ids": ({"positions": None}, r"must be \[2, 5, 4\].*got \[80, 4\]"),
        "an expanded tensor in place": (
            {"q": q[:, :1].detach().expand(2, 5, 2, 8), "inplace": True},
            r"q, which is written, must not be expanded, got strides \(.*0.*\)",
        ),
        "grids that overrun": (
            {"positions": long, "q": q[:, :1, :], "k": k[:, :1, :]},
            "end at token 12 overrun a sequence of 2",
        ),
    }


@pytest.mark.parametrize("case", wrong("cpu"))
@pytest.mark.parametrize("op", [apply_rotary, reference.apply_rotary], ids=["kernel", "reference"])
def test_invalid_arguments_raise(device, op, case):
    change, message = wrong(device)[case]
    with pytest.raises(ValueError, match=rf"(?s)^apply_rotary: .*{message}"):
        op(**make_inputs(N=5, device=device) | change)


@pytest.mark.kernel
def test_unsupported_layouts_raise_on_a_gpu(device):
    inputs = make_inputs(N=5, device=device)
    q = inputs["q"].transpose(1, 3).contiguous().transpose(1, 3)
    with pytest.raises(
        ValueError, match=r"last dimension must be contiguous.*\(80, 2, 1, 10\)|got"
    ):
        apply_rotary(**inputs | {"q": q})
    spread = torch.cat([inputs["sin"]] * 2, 1)[:, :4]
    with pytest.raises(ValueError, match="the same strides"):
        apply_rotary(**inputs | {"sin": spread})
    with pytest.raises(ValueError, match="must not require grad"):
        apply_rotary(**inputs | {"cos": inputs["cos"].requires_grad_()})
