"""Conversations about pictures, as token ids."""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from comemo.nano.scenes import Item, Scene
from comemo.nano.words import DIRECTIONS, SHAPES, WORDS
from examples.long_context.pictures import Pictures

IMAGE, IGNORED = -1, -100  # in `ids`: an image token; in `labels`: no loss


@dataclass
class Sample:
    """A conversation.

    Attributes:
        ids: of the tokens; `IMAGE` where a picture's tokens are.
        labels: the id where it is of an answer, else `IGNORED`.
        pictures: the indices of its pictures, in order.
        answers: first token and end of what is counted: an answer, or one thing of a list.
    """

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    pictures: list[int] = field(default_factory=list)
    answers: list[tuple[int, int]] = field(default_factory=list)


class Writer:
    """Writes conversations about `pictures`.

    Args:
        encode: text -> ids, without special tokens at its ends.
        pictures: to talk about.
    """

    def __init__(self, encode: Callable[[str], list[int]], pictures: Pictures) -> None:
        self._encode, self._known = encode, dict[str, list[int]]()
        self.pictures = pictures

    def say(self, sample: Sample, text: str, learnt: bool = False) -> None:
        """Add text, with its labels if it is to be learnt."""
        if text not in self._known:
            self._known[text] = self._encode(text)
        ids = self._known[text]
        sample.ids += ids
        sample.labels += ids if learnt else [IGNORED] * len(ids)

    def show(self, sample: Sample, index: int) -> None:
        """Add a picture."""
        self.say(sample, "<img>")
        sample.ids += [IMAGE] * self.pictures.count(index)
        sample.labels += [IGNORED] * self.pictures.count(index)
        sample.pictures.append(index)
        self.say(sample, "</img>\n")

    def choose(self, index: int, random: Random, most: int = 7) -> list[Item]:
        """Things of a picture to ask for, in any order."""
        items = list(self.pictures.scenes[index].items.values())
        return random.sample(items, min(most, len(items)))

    def ask(self, sample: Sample, items: list[Item]) -> None:
        """Ask for the colours of shapes, each once: no answer helps another."""
        for item in items:
            self.say(sample, f"Which colour is the {item.text}?\n")
            self._answer(sample, item.colour)
            self.say(sample, "\n", learnt=True)

    def describe(self, sample: Sample, index: int) -> None:
        """Ask for a list of everything in a picture; each thing of it is counted."""
        self.say(sample, "Describe everything in the picture.\n")
        for number, phrase in enumerate(phrases := listing(self.pictures.scenes[index])):
            if number:
                self.say(sample, " and" if number == len(phrases) - 1 else ",", learnt=True)
            self._answer(sample, f" {phrase}" if number else phrase)
        self.say(sample, "\n", learnt=True)

    def fill(self, sample: Sample, random: Random, tokens: int) -> None:
        """Add exactly so many tokens of sentences that have nothing to do with a picture."""
        end = len(sample.ids) + tokens
        while len(sample.ids) < end:
            self.say(sample, _sentence(random))
        del sample.ids[end:], sample.labels[end:]

    def chat(
        self, sample: Sample, tokens: int, others: Callable[[], int], asked: list[Item]
    ) -> None:
        """Add about so many tokens, at least, of other pictures and lists of what is in them.

        Args:
            sample: to add to.
            tokens: at least, if more than 0.
            others: the index of another picture; called until that has no shape that is `asked`.
            asked: what will be asked for after it: the first picture alone has the answers. Loses
                its last if there is no such other picture.

        Raises:
            ValueError: all others have the last that is left.
        """
        end = len(sample.ids) + tokens
        while len(sample.ids) < end:
            index = self._without(others, asked)
            scene = self.pictures.scenes[index]
            self.show(sample, index)
            *most, last = listing(scene)
            listed = f"{', '.join(most)} and {last}" if most else last
            self.say(sample, f"Describe everything in the picture.\n{listed}\n")

    def _without(self, others: Callable[[], int], asked: list[Item]) -> int:
        while asked:
            for _ in range(1000):
                index = others()
                shown = {item.text for item in self.pictures.scenes[index].items.values()}
                if shown.isdisjoint(item.text for item in asked):
                    return index
            lost = asked.pop()
        raise ValueError(f"chat: wanted pictures without a {lost.text}, found none")

    def _answer(self, sample: Sample, text: str) -> None:
        start = len(sample.ids)
        self.say(sample, text, learnt=True)
        sample.answers.append((start, len(sample.ids)))


def listing(scene: Scene) -> list[str]:
    """What a list of everything in a picture names, in the order of `SHAPES`."""
    items = sorted(scene.items.values(), key=lambda item: SHAPES.index(item.text))
    return [item.phrase() for item in items]


def _sentence(random: Random) -> str:
    one, two = random.sample(WORDS, 2)
    return random.choice(
        (
            f"The {one} is in the {two}.\n",
            f"The word {one} is under the word {two}.\n",
            f"Where does the {one} point?\n{random.choice(DIRECTIONS)}\n",
            f"Does the sign say {one}?\n{random.choice(('yes', 'no'))}\n",
        )
    )
