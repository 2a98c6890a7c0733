"""Errors of attend_spans and attention_workspace."""

import pytest
import torch
from attention_inputs import make_inputs
from conftest import DEVICE, GPU, INTERPRET

pytest.importorskip("triton")


from comemo_kernels import (
    AttentionWorkspace,
    MemoryScales,
    QueryRotation,
    attend_spans,
    attention_workspace,
)

pytestmark = pytest.mark.kernel(reference=True)


def test_invalid_arguments_raise():
    inputs, rest = make_inputs()
    rotation = QueryRotation(inputs.pop("cos"), inputs.pop("sin"), **rest)

    def wrong(message, *, rotation=rotation, **changes):
        with pytest.raises(ValueError, match=message):
            attend_spans(**inputs | changes, rotation=rotation)

    q, k, spans = inputs["q"], inputs["k"], inputs["spans"]
    wrong(r"q must be \[B, N, H, D\]", q=q[0])
    wrong("with G dividing 2", k=k.expand(-1, 3, -1), v=k.expand(-1, 3, -1))
    wrong("of one dtype", v=inputs["v"].half())
    wrong("k and v must be torch.float32 like q", k=k.half(), v=k.half())
    wrong(r"spans must be .* \(2, 3, 2\) or \(2, 1, 2\)", spans=spans[:, :2])
    wrong("spans must be int32 or int64", spans=spans.float())
    wrong("with R at most 16", rotation=rotation._replace(cos=torch.ones(9, 9)))
    wrong("rotation.positions must be", rotation=rotation._replace(positions=spans))
    wrong("or both None, got torch.int32", rotation=rotation._replace(biases=None))
    wrong("or both None", rotation=rotation._replace(biases=rotation.biases[:, :1]))
    scales = MemoryScales(torch.ones(5, 1), torch.ones(5, 1), 16)
    wrong("or torch.float8_e4m3fn with scales", scales=scales)
    eight = {"k": k.to(torch.float8_e4m3fn), "v": k.to(torch.float8_e4m3fn)}
    wrong("got torch.float8_e4m3fn without scales", **eight)
    wrong("for 70 rows in tiles of 32", **eight, scales=scales._replace(tile=32))
    for starts in ([1, 32], [0, 0], [32, 0]):
        wrong(
            "must ascend from 0",
            rotation=rotation._replace(starts=torch.tensor(starts, dtype=torch.int32).to(DEVICE)),
            validate=True,
        )
    with pytest.raises(ValueError, match="the workspace must come from attention_workspace for"):
        attend_spans(**inputs, workspace=attention_workspace(q[:1], k))
    workspace = attention_workspace(q, k, 2)
    for change in (
        {"lse": workspace.lse[:1]},
        {"lse": workspace.lse.double()},
        {"counts": workspace.counts.float()},
        *([{"counts": workspace.counts[:1]}] if INTERPRET or GPU else []),
    ):
        with pytest.raises(ValueError, match="the workspace must come from attention_workspace"):
            attend_spans(**inputs, workspace=workspace._replace(**change))
    with pytest.raises(ValueError, match="splits must be an integer from 1 to 65536, got 0"):
        attention_workspace(q, k, 0)
    with pytest.raises(ValueError, match="with G dividing H"):
        attention_workspace(q, k.expand(-1, 3, -1))


@pytest.mark.kernel
def test_unsupported_layouts_raise_on_a_gpu():
    inputs, rest = make_inputs()
    rotation = QueryRotation(inputs.pop("cos"), inputs.pop("sin"), **rest)
    for message, changes in (
        ("float64 has no kernel", {n: inputs[n].double() for n in ("q", "k", "v")}),
        ("D must be contiguous", {"q": inputs["q"].transpose(2, 3).contiguous().transpose(2, 3)}),
        ("the same strides", {"v": inputs["v"].repeat(1, 2, 1)[:, :1]}),
        (
            "start and end of a span must be adjacent",
            {"spans": inputs["spans"].transpose(1, 2).contiguous().transpose(1, 2)},
        ),
        (
            "the whole head must be rotated, got 8 of 16",
            {
                "rotation": rotation._replace(
                    cos=rotation.cos[:, :4].contiguous(), sin=rotation.sin[:, :4].contiguous()
                )
            },
        ),
    ):
        with pytest.raises(ValueError, match=f"on a GPU .*{message}"):
            attend_spans(**{**inputs, "rotation": rotation, **changes})
    inputs["q"].requires_grad_()
    workspace = attention_workspace(inputs["q"], inputs["k"])
    with pytest.raises(ValueError, match="a workspace excludes gradients"):
        attend_spans(**inputs, workspace=workspace)
    assert isinstance(workspace, AttentionWorkspace)
