"""Ask a trained model: over the distance, over the number of tiles, and for lists.

Answers are teacher-forced: one is right if every one of its tokens is the likeliest.
"""

from collections.abc import Callable, Iterator
from random import Random
from typing import NamedTuple

import torch

from comemo import CoMemoForConditionalGeneration
from examples.long_context.conversations import Sample, Writer
from examples.long_context.paths import arguments, collate
from examples.long_context.training import MOST

DISTANCES = (0, 64, 256, 512, 1024, 2048, 4096)
FILLERS = ("text", "pictures")
ASKED = 48  # pictures at each distance up to 1,024; fewer beyond, which take long
AT_ONCE = 6000  # tokens of a forward, about


class Result(NamedTuple):
    """One number of a configuration.

    Attributes:
        task: "distance text", "distance pictures", "tiles", "caption" or "long generation".
        at: tokens between, most tiles, or the place in the list.
        right, asked: answers.
    """

    task: str
    at: int
    right: int
    asked: int


def evaluate(
    model: CoMemoForConditionalGeneration,
    path: str,
    writer: Writer,
    sets: dict[str, range],
    distances: tuple[int, ...] = DISTANCES,
) -> list[Result]:
    """All results of a configuration. Every configuration is asked the same questions.

    Args:
        model: trained.
        path: of `PATHS`.
        writer: of conversations about pictures that nobody learnt from.
        sets: the indices of the pictures: "any", "short" and "long" lists, and "tiles N" for each
            number of tiles, which all show the same.
        distances: tokens between a picture and its questions.
    """
    results = []
    for filler in FILLERS:
        for distance in distances:
            samples = list(_distant(writer, sets["any"], filler, distance))
            right = [hit for hits in grade(model, path, writer, samples) for hit in hits]
            results.append(Result(f"distance {filler}", distance, sum(right), len(right)))
    for name in sets:
        if name.startswith("tiles "):
            samples = [_near(writer, index, _ask(writer)) for index in sets[name]]
            right = [hit for hits in grade(model, path, writer, samples) for hit in hits]
            results.append(Result("tiles", int(name.split()[1]), sum(right), len(right)))
    for task, name in (("caption", "short"), ("long generation", "long")):
        samples = [_near(writer, index, _describe(writer)) for index in sets[name]]
        lists = grade(model, path, writer, samples)
        for place in range(max(map(len, lists))):
            right = [hits[place] for hits in lists if len(hits) > place]
            results.append(Result(task, place + 1, sum(right), len(right)))
    return results


@torch.no_grad()
def grade(
    model: CoMemoForConditionalGeneration, path: str, writer: Writer, samples: list[Sample]
) -> list[list[bool]]:
    """Whether each answer of each sample is right.

    Args:
        model: trained.
        path: of `PATHS`.
        writer: whose pictures they show.
        samples: conversations.
    """
    model.eval()
    grades = []
    while samples:
        count = max(1, AT_ONCE // max(len(sample.ids) for sample in samples))
        some, samples = samples[:count], samples[count:]
        given, labels = arguments(model, collate(some, writer.pictures), path)
        found = model(**given).logits.argmax(-1)
        for sample, row, wanted in zip(some, found, labels, strict=True):
            # The labels keep their order where image tokens are left out.
            places = (wanted >= 0).nonzero().squeeze(1)
            right = (row[places - 1] == wanted[places]).tolist()
            learnt = [place for place, label in enumerate(sample.labels) if label >= 0]
            hits = dict(zip(learnt, right, strict=True))
            grades.append([all(hits[t] for t in range(*answer)) for answer in sample.answers])
    return grades


def _distant(writer: Writer, chosen: range, filler: str, distance: int) -> Iterator[Sample]:
    count = ASKED if distance <= 1024 else ASKED * 1024 // distance
    for index in chosen[:count]:
        random = Random(f"{filler} {distance} {index}")
        sample, asked = Sample(), writer.choose(index, random, MOST)
        writer.show(sample, index)
        if filler == "text":
            writer.fill(sample, random, distance)
            writer.ask(sample, asked)
        else:
            writer.chat(sample, distance, lambda r=random: r.choice(chosen), asked)
            writer.ask(sample, asked)
        yield sample


def _near(writer: Writer, index: int, add: Callable[[Sample, int, Random], None]) -> Sample:
    sample = Sample()
    writer.show(sample, index)
    add(sample, index, Random(f"near {writer.pictures.scenes[index].seed}"))
    return sample


def _ask(writer: Writer) -> Callable[[Sample, int, Random], None]:
    return lambda sample, index, random: writer.ask(sample, writer.choose(index, random))


def _describe(writer: Writer) -> Callable[[Sample, int, Random], None]:
    return lambda sample, index, random: writer.describe(sample, index)
