"""The loss of hidden states, in chunks: equal to that of whole logits, in less memory."""

import pytest
import torch
from conftest import every_two
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from comemo import linear_loss
from comemo.loss import loss_of_states, next_token_loss

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE, WIDTH, WORDS = (3, 7), 8, 31


def make(seed=0, dtype=torch.float32, trained=True):
    torch.manual_seed(seed)
    head = nn.Linear(WIDTH, WORDS, bias=False).to(dtype).requires_grad_(trained)
    states = torch.randn(*SHAPE, WIDTH, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, WORDS, SHAPE)
    labels[0, :3] = labels[1, 2:] = -100
    return states, head, labels, torch.rand(SHAPE)


def shifted(labels, weights):
    labels, weights = labels.roll(-1, 1), weights.roll(-1, 1)
    labels[:, -1] = -100
    return labels, weights


@pytest.fixture(params=[1, 4, 1000], ids=lambda rows: f"{rows} rows")
def chunk(request, monkeypatch):
    monkeypatch.setattr(linear_loss, "CHUNK", request.param * WORDS)


def called(head):
    head.register_forward_hook(lambda module, args, out: out)
    return head


@pytest.mark.parametrize(
    ("form", "weighted", "items", "plain", "trained"),
    every_two(["labels", "shift_labels"], *[[False, True], [None, 5.0]], *[[False, True]] * 2),
)
def test_equals_the_loss_of_logits(chunk, form, weighted, items, plain, trained):
    states, head, labels, weights = make(trained=trained)
    given = {"labels": labels, "weights": weights if weighted else None}
    if form == "shift_labels":
        moved, weight = shifted(labels, weights)
        given = {"labels": None, "shift_labels": moved, "weights": weight if weighted else None}
    leaves = [states, head.weight] if trained else [states]
    wanted = next_token_loss(head(states), **given, num_items_in_batch=items)
    gradients = torch.autograd.grad(wanted, leaves)
    head = head if plain else called(head)
    found, single = loss_of_states(states, head, **given, num_items_in_batch=items)
    assert torch.allclose(found, wanted, rtol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(found, leaves), gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    assert not single.requires_grad
    losses = head(states).log_softmax(-1)
    for b in range(SHAPE[0]):
        for n in range(1, SHAPE[1]):
            loss = 0.0 if labels[b, n] < 0 else -losses[b, n - 1, labels[b, n]].item()
            place = n - 1 if form == "shift_labels" else n
            assert single[b, place].item() == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("plain", [True, False])
def test_no_label_at_all(plain):
    states, head, labels, weights = make()
    head = head if plain else called(head)
    labels = torch.full_like(labels, -100)
    loss, single = loss_of_states(states, head, labels, weights, num_items_in_batch=1)
    loss.backward()
    assert loss == 0
    assert not single.any()
    assert not states.grad.any()
    assert not head.weight.grad.any()
    assert loss_of_states(states, head, labels)[0].isnan()


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_gradients_scale_with_the_loss(chunk, factor):
    states, head, labels, _ = make()
    (next_token_loss(head(states), labels) * factor).backward()
    wanted = states.grad.clone(), head.weight.grad.clone()
    states.grad = head.weight.grad = None
    (loss_of_states(states, head, labels)[0] * factor).backward()
    assert torch.allclose(states.grad, wanted[0], atol=1e-7)
    assert torch.allclose(head.weight.grad, wanted[1], atol=1e-7)


def test_a_second_backward_pass_is_refused():
    states, head, labels, _ = make()
    loss, _ = loss_of_states(states, head, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="needs a second forward pass"):
        loss.backward()


def test_autocast_rounds_no_more_than_pytorch(chunk):
    states, head, labels, weights = make()
    exact = [states.detach().double(), head.weight.detach().double()]
    exact = [x.requires_grad_() for x in exact]
    wanted = next_token_loss(exact[0] @ exact[1].T, labels, weights)
    gradients = torch.autograd.grad(wanted, exact)

    def errors(loss):
        found = torch.autograd.grad(loss, [states, head.weight])
        assert [x.dtype for x in found] == [torch.float32] * 2
        return [(x - y).abs().max().item() for x, y in zip(found, gradients, strict=True)]

    with torch.autocast("cpu", torch.bfloat16):
        theirs = errors(next_token_loss(head(states), labels, weights))
        ours = errors(loss_of_states(states, head, labels, weights)[0])
    assert ours[0] <= 3 * theirs[0]
    assert ours[1] <= 3 * theirs[1]


@pytest.mark.parametrize("plain", [True, False])
def test_logits_of_all_rows_are_never_in_memory(plain, monkeypatch):
    monkeypatch.setattr(linear_loss, "CHUNK", 4 * WORDS)
    states, head, labels, _ = make()
    head = head if plain else called(head)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.ndim == 2 and out.shape[1] == WORDS:
                largest = max(largest, len(out))
            return out

    with Watch():
        loss_of_states(states, head, labels)[0].backward()
    assert largest in (4, WIDTH)  # a chunk, or the transposed weight


def test_liger_computes_the_same(monkeypatch):
    """With its arithmetic written in PyTorch: its kernel overwrites the logits, as that does."""
    calls = []

    class Overwrites(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits, labels):
            losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            logits.copy_(logits.softmax(1) - torch.nn.functional.one_hot(labels, WORDS))
            ctx.save_for_backward(logits.detach())
            calls.append(logits.dtype)
            return losses

        @staticmethod
        def backward(ctx, grad):
            return ctx.saved_tensors[0] * grad[:, None], None

    def liger(logits, labels, reduction):
        assert reduction == "none"
        return Overwrites.apply(logits, labels)

    states, head, labels, weights = make()
    wanted = loss_of_states(states, head, labels, weights)
    gradients = torch.autograd.grad(wanted[0], [states, head.weight])
    monkeypatch.setattr(linear_loss, "_liger", lambda device: liger)
    found = loss_of_states(states, head, labels, weights)
    assert calls == [torch.float32]
    for x, y in zip(found, wanted, strict=True):
        assert torch.allclose(x, y)
    for x, y in zip(torch.autograd.grad(found[0], [states, head.weight]), gradients, strict=True):
        assert torch.allclose(x, y, atol=1e-7)


@pytest.mark.kernel
def test_liger_itself(monkeypatch, device):
    """Its kernels, in Triton's interpreter or on a GPU, where it is installed."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    states, head, labels, weights = make()
    states, head = states.detach().to(device).requires_grad_(), head.to(device)
    found = []
    for liger in (None, linear_loss._liger("any")):
        monkeypatch.setattr(linear_loss, "_liger", lambda kind, liger=liger: liger)
        loss, single = loss_of_states(states, head, labels, weights)
        found.append([single, *torch.autograd.grad(loss, [states, head.weight])])
    for x, y in zip(*found, strict=True):
        assert torch.allclose(x, y, atol=1e-6)


def test_says_what_is_wrong():
    states, head, labels, weights = make()
    with pytest.raises(ValueError, match=r"labels must be \(3, 7\)"):
        loss_of_states(states, head, labels[:, 1:])
    with pytest.raises(ValueError, match=r"loss_weights must be \(3, 7\)"):
        loss_of_states(states, head, labels, weights[1:])
