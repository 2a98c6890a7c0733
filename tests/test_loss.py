"""The training loss: divisor, shifted labels, weights, and errors."""

import pytest
import torch
import torch.nn.functional as F
from small import make_model, make_prompts, place
from transformers.loss.loss_utils import ForCausalLMLoss

from comemo.loss import next_token_loss


@pytest.fixture
def drawn():
    torch.manual_seed(0)
    labels = torch.randint(0, 11, (4, 9))
    labels[0, :4] = labels[2] = -100
    return torch.randn(4, 9, 11), labels, torch.rand(4, 9)


def test_equals_the_loss_of_transformers(drawn):
    logits, labels, _ = drawn
    for items in (None, 50, torch.tensor(50)):
        wanted = ForCausalLMLoss(logits, labels, 11, num_items_in_batch=items)
        found = next_token_loss(logits, labels, num_items_in_batch=items)
        assert torch.allclose(found, wanted)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    wanted = ForCausalLMLoss(logits, None, 11, shift_labels=shifted)
    assert torch.allclose(next_token_loss(logits, None, shift_labels=shifted), wanted)
    other = torch.zeros_like(labels)  # shift_labels replace labels
    assert torch.allclose(next_token_loss(logits, other, shift_labels=shifted), wanted)


def test_weighted_mean(drawn):
    logits, labels, weights = drawn
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
    )
    counted = weights[:, 1:].flatten() * (labels[:, 1:].flatten() != -100)
    wanted = (losses * counted).sum() / counted.sum()
    assert torch.allclose(next_token_loss(logits, labels, weights), wanted)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    moved = F.pad(weights, (0, 1))[:, 1:]
    assert torch.allclose(next_token_loss(logits, None, moved, shifted), wanted)
    summed = next_token_loss(logits, labels, weights, num_items_in_batch=counted.sum())
    assert torch.allclose(summed, wanted)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_sum_does_not_depend_on_the_split(drawn, weighted):
    logits, labels, weights = drawn
    items = (labels[:, 1:] != -100).sum()

    def loss(rows):
        own = weights[rows] if weighted else None
        return next_token_loss(logits[rows], labels[rows], own, num_items_in_batch=items)

    whole = loss(slice(None))
    for size in (1, 2, 3):
        parts = [loss(slice(i, i + size)) for i in range(0, 4, size)]
        assert torch.allclose(torch.stack(parts).sum(), whole)


def test_all_labels_masked_is_nan_without_a_divisor(drawn):
    logits, labels, _ = drawn
    masked = torch.full_like(labels, -100)
    assert next_token_loss(logits, masked).isnan()
    assert next_token_loss(logits, masked, num_items_in_batch=7) == 0


def test_wrong_shapes_are_refused(drawn):
    logits, labels, weights = drawn
    with pytest.raises(ValueError, match=r"labels must be \(4, 9\).*logits_to_keep=0.* \(4, 8\)"):
        next_token_loss(logits, labels[:, 1:])
    with pytest.raises(ValueError, match=r"shift_labels must be \(4, 9\)"):
        next_token_loss(logits, None, shift_labels=labels[:2])
    with pytest.raises(ValueError, match=r"loss_weights must be \(4, 9\)"):
        next_token_loss(logits, labels, weights[:, :1])


def test_the_model_accepts_arguments_of_trainer():
    model = make_model()
    batch = make_prompts(model)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    plain = model(**batch, labels=labels)
    items = place(torch.tensor(7))
    divided = model(**batch, labels=labels, num_items_in_batch=items)
    count = (labels[:, 1:] != -100).sum()
    assert torch.allclose(divided.loss * items, plain.loss * count, rtol=1e-5)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    assert torch.allclose(model(**batch, shift_labels=shifted).loss, plain.loss)
    with pytest.raises(ValueError, match=r"labels must be .* \(2, 41\)"):
        model(**batch, labels=labels, logits_to_keep=1)
