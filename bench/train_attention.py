"""Attention over the image memory and its gradients, by several ways, and the exact ones."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import comemo_kernels as ops
from bench import published
from bench.attending import Attending
from bench.cases import HEAD_DIM
from bench.readings import Reading
from bench.steps import Outputs, Step, largest_error, leaves_of
from bench.ways import Clock, Work
from comemo_kernels import reference
from comemo_kernels.reference.attention import rotate_by_distance

FLEX = ("16k_8_many", "16k_1_many")  # cases of FlexAttention: each takes a compilation


class AttentionStep(Attending):
    """Queries, keys and values of a case, and the cotangent of the output.

    Every way gets its own leaves: `ours` the keys by their place in the image and queries that it
    rotates, `published` and `compile` keys by the ids of the prompt, all others also rotated
    queries.
    """

    def __init__(self, size: str, case: str, reading: Reading, clock: Clock) -> None:
        super().__init__(size, case, clock, reading)
        self.cotangent = clock.draw(*self.sets[0].q.shape)
        sizes = torch.tensor(reading.sizes, device=self.device)
        biases = reading.places(self.device)[2]
        self.shift = biases[0].repeat_interleave(sizes)  # ids of the prompt, less places in images
        counts = [count for count, _ in reading.samples]
        self.samples = published.Samples.of(counts, reading.lengths, self.device)

    def steps(self, compiled: bool) -> dict[str, Step]:
        s = self.sets[0]
        rotated = (s.rotated, s.absolute, s.v)

        def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = ops.attend_spans(q, k, v, self.spans, self.rotation)
            assert isinstance(out, Tensor)
            return out

        def as_published(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.attend(published.rotate(q, *self.wide, self.positions), k, v)

        steps = {
            "ours": self.step(ours, s.q, s.k, s.v),
            "published": self.step(as_published, s.q, s.absolute, s.v),
        }
        if compiled:
            whole = torch.compile(as_published, dynamic=False)
            steps["compile"] = self.step(whole, s.q, s.absolute, s.v)
        if len(self.samples.counts) == 1:
            for name, backend in self.backends().items():
                steps[name] = self.step(_pinned(backend), *rotated)
        if self.device == "cuda":
            if published.varlen_attn is not None and self.dtype != torch.float32:
                steps["varlen"] = self.step(self.attend, *rotated)
            if compiled and self.name in FLEX:
                steps["flex"] = self.step(self.flex(), *rotated)
        return steps

    def step(self, forward: Callable[..., Tensor], *tensors: Tensor) -> Step:
        return Step(forward, leaves_of(*tensors), [self.cotangent])

    def backends(self) -> dict[str, SDPBackend]:
        found = {"sdpa flash": SDPBackend.FLASH_ATTENTION}
        if self.device == "cuda":
            found["sdpa cudnn"] = SDPBackend.CUDNN_ATTENTION
        return found

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rotated queries on keys by the ids of the prompt."""
        return published.attend_samples(q, k[None], v[None], self.samples)

    def flex(self) -> Callable[..., Tensor]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        starts, ends = self.spans.expand(*self.reading.shape, 2)[0].T.contiguous().unbind(0)
        N, M = self.reading.queries, len(self.ids)
        mask = create_block_mask(
            lambda b, h, q, k: (k >= starts[q]) & (k < ends[q]), None, None, N, M, self.device
        )
        attend = torch.compile(flex_attention, dynamic=False)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in (q, k[None], v[None]))
            return attend(q, k, v, block_mask=mask).transpose(1, 2)

        return call

    def exact(self) -> tuple[list[int], Outputs]:
        """The first and last head; their output and gradients of q, k, v in float64, as of ours."""
        heads, s = sorted({0, self.heads - 1}), self.sets[0]
        leaves = leaves_of(*(t[..., heads, :].double() for t in (s.q, s.k, s.v)))

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = reference.attend_spans(q, k, v, self.spans, self.rotation)
            assert isinstance(out, Tensor)
            return out

        step = Step(attend, leaves, [self.cotangent[..., heads, :].double()])
        return heads, step.run()

    def error_of(self) -> Callable[[str, Any], float]:
        """Largest error of the output and all gradients, of two heads."""
        heads, (out, dq, dk, dv) = self.exact()
        table = self.rotation[:2]
        turned = rotate_by_distance(dk, self.shift, *table)
        wanted = {
            "ours": (out, dq, dk, dv),
            "published": (out, dq, turned, dv),
            "compile": (out, dq, turned, dv),
        }
        others = (out, rotate_by_distance(dq, self.positions, *table), turned, dv)

        def error(name: str, found: Any) -> float:
            truth = wanted.get(name.split()[0], others)
            return largest_error([t[..., heads, :] for t in found], truth)

        return error

    def nominal(self) -> tuple[Work, Work]:
        """Of forward and backward, and of the backward alone.

        The backward is nominally 2.5 times the forward: five products instead of two.
        """
        flops = 4 * self.reading.pairs * self.heads * HEAD_DIM
        s = self.sets[0]
        # Read q, k, v and write out; read also out and its gradient and write three gradients.
        forward, backward = 2 * s.q.nbytes + 2 * s.k.nbytes, 4 * s.q.nbytes + 4 * s.k.nbytes
        return Work(3.5 * flops, forward + backward), Work(2.5 * flops, backward)


def _pinned(backend: SDPBackend) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return published.attend(q, k[None], v[None])

    return call
