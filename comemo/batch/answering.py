"""Answers to requests: images read once, prompts padded on the left, one call of `generate`.

Letters: B requests, N tokens of the longest prompt.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from comemo import prompts
from comemo.batch.options import can_share_batch
from comemo.batch.requests import Request
from comemo.batch.settings import BatchSettings
from comemo.chat.driver import check_tokenizer
from comemo.chat.options import text_options
from comemo.chat.streamers import answer_text
from comemo.decode.interface import GeneratingModel
from comemo.generation_inputs import check_range
from comemo.images import normalise_pixels, open_image, split_tiles, stack_tiles
from comemo.memory.protocols import KeepsMemories
from comemo.processing.read_ahead import AT_ONCE, ReadAhead
from comemo.processor import CoMemoProcessor

PREFILL = 4096  # tokens of one pass over the prompts; bounds memory, as in a `ChatSession`
IMAGES_HELD = 8  # tiles of so many images are kept: neighbouring lines often share them
IMAGES_AHEAD = 8  # are read while a batch is answered
_FULL = re.compile("out of memory|not enough memory|can't allocate memory")

Tiles = tuple[Tensor, tuple[int, int]]  # uint8 [t, 3, side, side] and (cols, rows)


@dataclass(frozen=True)
class Result:
    """What became of a request.

    Attributes:
        line: its number.
        answer: text; None if there is an error.
        tokens: generated ones, the stop token included.
        error: the reason why there is no answer.
    """

    line: int
    answer: str | None = None
    tokens: int = 0
    error: str | None = None


@dataclass(frozen=True)
class _Row:
    request: Request
    ids: list[int]
    images: list[Tiles]


class Answerer:
    """Answers requests with a model. The answer of a request is the same in any batch.

    In a `with`, which ends the threads that read images.

    Args:
        model: a `CoMemoForConditionalGeneration`.
        processor: of its checkpoint.
        settings: of the run. A drawn answer depends on the seed and on the number of its line
            alone.
        store: to look image memories up in; None to compute them.

    Raises:
        ValueError: a tokenizer without CoMemo's control tokens.
    """

    def __init__(
        self,
        model: GeneratingModel,
        processor: CoMemoProcessor,
        settings: BatchSettings,
        store: KeepsMemories | None = None,
    ) -> None:
        self.model, self.processor, self.store = model, processor, store
        self.settings = settings
        self._stop = prompts.stop_text(model.config.template)
        self._template = prompts.chat_template(model.config.template)
        check_tokenizer(processor.tokenizer, self._stop)
        self._stop_id = processor.tokenizer.convert_tokens_to_ids(self._stop)
        readers = min(torch.get_num_threads(), AT_ONCE)
        self._images = ReadAhead(self._read_image, readers, IMAGES_AHEAD, IMAGES_HELD)

    def __enter__(self) -> "Answerer":
        return self

    def __exit__(self, *error: Any) -> None:
        self._images.__exit__(*error)

    def answer(
        self, requests: Sequence[Request], following: Sequence[Request] = ()
    ) -> Iterator[Result]:
        """Answer requests that `group_of` puts together.

        Args:
            requests: of one group.
            following: answered next: their images are read while these are answered.

        Yields:
            One result each, those with bad images first. What is wrong with one request is in its
            result; the others are answered.

        Raises:
            Exception: what says nothing about a single request, such as an error of the device.
        """
        rows = []
        for index, request in enumerate(requests):
            later = [source for r in (*requests[index + 1 :], *following) for source in r.images]
            try:
                rows.append(self._prepare(request, later))
            except (ValueError, OSError, MemoryError) as error:
                yield Result(request.line, error=describe(error))
        yield from self._answer(rows)

    def _answer(self, rows: list[_Row]) -> Iterator[Result]:
        if not rows:
            return
        try:
            yield from self._generate(rows)
            return
        except Exception as error:
            if not is_of_request(error):
                raise
            reason = describe(error)
        # Outside of the handler: the exception holds the tensors of the failed call.
        if len(rows) == 1:
            yield Result(rows[0].request.line, error=reason)
        else:
            for row in rows:
                yield from self._answer([row])

    def _prepare(self, request: Request, later: list[str | bytes]) -> _Row:
        """Open the images and encode the prompt; the images of later requests are expected."""
        images = []
        for index, source in enumerate(request.images):
            self._images.expect([*request.images[index:], *later])
            images.append(self._images.take(source))
        self._images.expect(later)
        text = self.processor.apply_chat_template(
            request.messages,
            chat_template=self._template,
            add_generation_prompt=True,
            tokenize=False,
        )
        per_tile = self.model.config.tokens_per_tile
        counts = [len(tiles) * per_tile for tiles, _ in images]
        ids = prompts.encode_with_images(self.processor.tokenizer, text, counts)
        return _Row(request, ids, images)

    def _read_image(self, source: str | bytes) -> Tiles:
        config = self.model.config
        most = self.settings.max_tiles or config.max_dynamic_patch
        tiles, grid = split_tiles(
            open_image(source, published=self.settings.published),
            config.vision_config.image_size[0],
            min(config.min_dynamic_patch, most),
            most,
            config.use_thumbnail,
            threads=1,
        )
        return torch.from_numpy(stack_tiles(tiles)), grid

    @torch.no_grad()
    def _generate(self, rows: list[_Row]) -> list[Result]:
        tokenizer, options = self.processor.tokenizer, dict(rows[0].request.options)
        options |= {"eos_token_id": self._stop_id, "pad_token_id": self._pad}
        options = text_options("batch", options, self.model, tokenizer)
        if options["do_sample"]:
            torch.manual_seed(seed_of(self.settings.seed, rows[0].request.line))
        tokens = self.model.generate(**self._inputs(rows), prefill_chunk_size=PREFILL, **options)
        results = []
        for row, found in zip(rows, tokens[:, 1:].tolist(), strict=True):
            # After its end a row of a batch is padded.
            end = found.index(self._stop_id) + 1 if self._stop_id in found else len(found)
            text = answer_text(tokenizer, found[:end], self._stop)
            results.append(Result(row.request.line, text, end))
        return results

    @property
    def _pad(self) -> int:
        pad = self.processor.tokenizer.pad_token_id
        return self._stop_id if pad is None else pad

    def _inputs(self, rows: list[_Row]) -> dict[str, Any]:
        """Inputs of `generate` for prompts [B, N] that are padded on the left.

        The ids are the start token alone, as in `chat`: penalties on repetition see generated
        tokens, neither the prompt nor its padding.
        """
        core, device = self.model.model, self.model.device
        ids = [torch.tensor(row.ids) for row in rows]
        padded = pad_sequence(ids, True, self._pad, padding_side="left").to(device)
        ones = [torch.ones_like(row) for row in ids]
        mask = pad_sequence(ones, True, 0, padding_side="left").to(device)
        context = self.processor.tokenizer.convert_tokens_to_ids(prompts.IMAGE_CONTEXT)
        image_mask = (padded == context) & mask.bool()
        images = [image for row in rows for image in row.images]
        grids = [grid for _, grid in images] if self.settings.rope == "dhr" and images else None
        positions = core.prompt_position_ids(image_mask, mask, grids)
        check_range(self.model.config, positions, mask, bool(images))
        memory = None
        if images:
            pixels = normalise_pixels(torch.cat([tiles for tiles, _ in images]).to(device))
            pixels = pixels.to(self.model.dtype)
            memory = core.build_image_memory(pixels, image_mask, positions, grids, self.store)
        return {
            "input_ids": torch.tensor([row[:1] for row in (r.ids for r in rows)], device=device),
            "inputs_embeds": core.embed(padded, image_mask, memory),
            "attention_mask": mask,
            "position_ids": positions,
            "image_memory": memory,
        }


def group_of(request: Request) -> tuple[Any, ...] | None:
    """A key that is the same for requests that may share a batch; None for one that must not.

    A batch has one set of options. Prompts without images stay apart, because mixin layers do not
    run for them.
    """
    if not can_share_batch(request.options):
        return None
    return bool(request.images), *request.options.items()


def seed_of(seed: int, line: int) -> int:
    """The seed of a line's answer, as `torch.manual_seed` takes it."""
    digest = hashlib.sha256(f"{seed}:{line}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def is_of_request(error: Exception) -> bool:
    """Whether an error may be due to one request: to its inputs, or to how much memory it needs."""
    known = (ValueError, OSError, MemoryError, torch.OutOfMemoryError)
    return isinstance(error, known) or (
        isinstance(error, RuntimeError) and _FULL.search(str(error)) is not None
    )


def describe(error: BaseException) -> str:
    """An error in one line, without the name of the function that raised it."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror + ("" if error.filename is None else f": {str(error.filename)!r}")
    if isinstance(error, (ValueError, OSError)):
        text = re.sub(r"^[A-Za-z_]\w*(\.\w+)*: ", "", text)
    return " ".join(text.split()) or type(error).__name__
