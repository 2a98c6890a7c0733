"""Fused linear layers: every ValueError."""

import pytest
import torch
from fused_linear_inputs import FORMS, VERBS, both, make_inputs

pytestmark = pytest.mark.kernel(reference=True)

WRONG = {
    "norm_linear": {
        "x of integers": ("x", lambda t: t.int(), r"x must be .* float64, got torch.int32 \(2, 24"),
        "x of no dimension": ("x", lambda t: t[0, 0], r"x must be .*got torch.float32 \(\)"),
        "a norm too short": ("norm_weight", lambda t: t[1:], r"norm_weight .*\(24,\).* \(23,\)"),
        "a weight turned": ("weight", lambda t: t.T, r"weight .*\(24, 24\).* got .*\(24, 10\)"),
        "a weight of one dimension": ("weight", lambda t: t[0], r"weight .*got .*\(24,\)"),
        "a weight of another dtype": ("weight", lambda t: t.half(), "weight must be torch.float32"),
        "a weight elsewhere": ("weight", lambda t: t.to("meta"), "weight .* on meta"),
    },
    "norm_swiglu": {
        "x of integers": ("x", lambda t: t.int(), "x must be .*got torch.int32"),
        "a gate too narrow": ("gate_weight", lambda t: t[:, 1:], r"gate_weight .*\(10, 23\)"),
        "weights of two widths": ("up_weight", lambda t: t[1:], r"up_weight .*\(10, 24\).*\(9, 24"),
        "a norm of float16": ("norm_weight", lambda t: t.half(), "norm_weight .*torch.float16"),
    },
    "gated_residual": {
        "x of float8": ("x", lambda t: t.to(torch.float8_e4m3fn), "x must be .*float8_e4m3fn"),
        "other rows": ("a", lambda t: t[:1], r"a must be .*\(2, 24\).* got .*\(1, 24\)"),
        "a of another dtype": ("a", lambda t: t.half(), "a must be torch.float32.*torch.float16"),
        "a weight turned": ("weight", lambda t: t.T, r"weight .*\(10, 24\).* got .*\(24, 10\)"),
        "a gate of no dimension": ("gate", lambda t: t[0], r"gate must be .*\(1,\).* got .*\(\)"),
        "a gate for each element": ("gate", lambda t: t.expand(10), r"gate .*got .*\(10,\)"),
    },
    "gated_swiglu": {
        "x of integers": ("x", lambda t: t.int(), "x must be .*got torch.int32"),
        "a norm too short": ("norm_weight", lambda t: t[1:], r"norm_weight .*\(24,\).* \(23,\)"),
        "weights of two widths": ("up_weight", lambda t: t[1:], r"up_weight .*\(10, 24\).*\(9, 24"),
        "a weight turned": ("down_weight", lambda t: t.T, r"down_weight .*\(24, 10\).*\(10, 24\)"),
        "a gate of no dimension": ("gate", lambda t: t[0], r"gate must be .*\(1,\).* got .*\(\)"),
        "another recompute": (
            "recompute",
            lambda _: "none",
            "recompute must be 'cheap' or 'projections', got 'none'",
        ),
        "recompute of no type": (
            "recompute",
            lambda _: None,
            "recompute must be 'cheap' or .*None",
        ),
    },
}


@pytest.mark.parametrize(("verb", "case"), [(verb, case) for verb in VERBS for case in WRONG[verb]])
@pytest.mark.parametrize("which", [0, 1], ids=["kernel", "reference"])
def test_says_what_is_wrong(device, verb, case, which):
    name, change, message = WRONG[verb][case]
    inputs = make_inputs(verb, device=device)
    with pytest.raises(ValueError, match=rf"^{verb}: {message}"):
        both(verb)[which](**inputs | {name: change(inputs.get(name))})


@pytest.mark.kernel
@pytest.mark.parametrize("form", FORMS)
def test_says_what_a_kernel_cannot_do(device, form):
    verb, inputs = form.split()[0], make_inputs(form, device=device)
    for name in (name for name, t in inputs.items() if t is not None and name != "gate"):
        turned = {name: torch.stack([inputs[name]] * 2, -1)[..., 0]}
        for grad in (False, True):  # for every number of rows, with gradients or without
            turned[name].requires_grad_(grad)
            with pytest.raises(ValueError, match=rf"^{verb}: .*contiguous, got .* of {name} \("):
                both(verb)[0](**inputs | turned)
