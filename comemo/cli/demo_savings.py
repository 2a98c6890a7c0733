"""What the image memory saves, measured on one picture while the user watches."""

import statistics
import tempfile
import time

import torch
from torch import Tensor

from comemo import prompts
from comemo.chat.session import ChatSession
from comemo.cli.progress import reading_bar
from comemo.cli.terminal import tell
from comemo.conditional_generation import CoMemoForConditionalGeneration
from comemo.processor import CoMemoProcessor
from comemo.store.store import MemoryStore

ROUNDS = 5  # of which the median counts: other programs disturb single ones
STEPS = 16  # tokens of each way


def show_store(
    model: CoMemoForConditionalGeneration,
    processor: CoMemoProcessor,
    question: str,
    tiles: tuple[Tensor, tuple[int, int]],
) -> None:
    """Ask in new conversations with and without a `MemoryStore`, and print what each took.

    Args:
        model, processor: of one checkpoint.
        question: about the picture.
        tiles: (pixel_values [T, 3, side, side], grid) of it.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = MemoryStore(directory=folder)
        first_token(model, processor, question, tiles, store)  # the picture becomes known
        kept = store.stats.disk_bytes
        known, new = (
            [first_token(model, processor, question, tiles, one) for _ in range(ROUNDS)]
            for one in (store, None)
        )
    seconds = [statistics.median(first for first, _ in ways) for ways in (known, new)]
    tell(
        f"\n4. A known picture costs no vision work\n   A store has its image memory, {kept:,}"
        " bytes. New conversations, until the first token:"
        f"\n   without a store {1e3 * seconds[1]:6.1f} ms, {new[0][1]} vision layers run"
        f"\n   with it         {1e3 * seconds[0]:6.1f} ms, {known[0][1]} vision layers run"
    )


def first_token(
    model: CoMemoForConditionalGeneration,
    processor: CoMemoProcessor,
    question: str,
    tiles: tuple[Tensor, tuple[int, int]],
    store: MemoryStore | None,
) -> tuple[float, int]:
    """Seconds until the first token of a new conversation, and how often a vision layer ran.

    Args:
        model, processor, question, tiles: see `show_store`.
        store: where the session looks the picture up.
    """
    session = ChatSession(model, processor, memory_store=store, do_sample=False)
    with reading_bar(model, len(tiles[0]), delay=60) as layers:  # whose bar nobody sees
        session.ask(question, tiles, max_new_tokens=1)
    assert session.report is not None
    return session.report.first_s, layers.calls["vision"]


def show_rebuilding(
    model: CoMemoForConditionalGeneration,
    processor: CoMemoProcessor,
    question: str,
    tiles: tuple[Tensor, tuple[int, int]],
) -> None:
    """Time tokens with the image memory reused, and rebuilt for each, and print both.

    Args:
        model, processor, question, tiles: see `show_store`.
    """
    (reused, builds), (rebuilt, more) = time_tokens(model, processor, question, tiles)
    tell(
        f"\n5. The image memory, reused or rebuilt\n   {STEPS} tokens read keys and values of the"
        f" picture in {len(model.config.mixin_layers)} mixin layers:"
        f"\n   reused  {1e3 * reused:6.2f} ms a token, {builds:2} computed anew"
        f"\n   rebuilt {1e3 * rebuilt:6.2f} ms a token, {more:2} computed anew, as in the published"
        " code"
        "\n   The picture is small here; python -m bench decode compares both at published sizes"
    )


@torch.no_grad()
def time_tokens(
    model: CoMemoForConditionalGeneration,
    processor: CoMemoProcessor,
    question: str,
    tiles: tuple[Tensor, tuple[int, int]],
) -> tuple[tuple[float, int], tuple[float, int]]:
    """Take the same decode steps with the image memory kept, and with it dropped before each.

    Args:
        model, processor, question, tiles: see `show_store`.

    Returns:
        Median seconds of a step and how often a layer's keys and values were built: reused, then
        rebuilt.

    Raises:
        RuntimeError: the two ways disagree.
    """
    pixel_values, grid = tiles
    text = prompts.build_prompt(
        [(f"{prompts.IMAGE_MARK}\n{question}", None)], model.config.template
    )
    counts = [len(pixel_values) * model.config.tokens_per_tile]
    ids = torch.tensor([prompts.encode_with_images(processor.tokenizer, text, counts)])
    mask = torch.ones(1, ids.shape[1] + 1, dtype=torch.long, device=model.device)
    out = model(
        input_ids=ids.to(model.device),
        attention_mask=mask[:, :-1],
        pixel_values=pixel_values.to(model.device),
        tile_grid=[grid],
        use_cache=True,
        logits_to_keep=1,
    )
    memory, cache = out.image_memory, out.past_key_values
    assert memory is not None
    token = out.logits[:, -1].argmax(-1, keepdim=True)

    def step() -> Tensor:
        logits = model(
            input_ids=token,
            attention_mask=mask,
            past_key_values=cache,
            image_memory=memory,
            use_cache=True,
        ).logits
        cache.crop(-1)  # the other way takes the same step
        return logits.cpu()  # waits for the device, whichever it is

    seconds: list[list[float]] = [[], []]
    built = [0, 0]
    for index in range(STEPS + 1):  # the first is a warm-up
        logits = []
        for way in (0, 1):
            if way == 1:
                memory.keys.clear()
                memory.values.clear()
            before = len(memory.keys)
            start = time.perf_counter()
            logits.append(step())
            if index:
                seconds[way].append(time.perf_counter() - start)
                built[way] += len(memory.keys) - before
        if not torch.allclose(logits[0], logits[1], rtol=1e-3, atol=1e-3):
            raise RuntimeError("time_tokens: wanted equal logits both ways, got different ones")
    reused, rebuilt = ((statistics.median(s), b) for s, b in zip(seconds, built, strict=True))
    return reused, rebuilt
