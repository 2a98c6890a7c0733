"""Conversations about pictures, as token ids."""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from comemo.nano.scenes import Scene
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

    def ask(
        self, sample: Sample, index: int, random: Random, which: str = "", most: int = 7
    ) -> None:
        """Ask for the colours of a picture's shapes, each once: no answer helps another.

        Args:
            sample: to add to.
            index: of the picture.
            random: chooses the order.
            which: names the picture: "in the first picture".
            most: questions.
        """
        items = list(self.pictures.scenes[index].items.values())
        for item in random.sample(items, min(most, len(items))):
            question = f"which colour is the {item.text}?\n"
            question = f"{which}, {question}" if which else question
            self.say(sample, question[0].upper() + question[1:])
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

    def chat(self, sample: Sample, random: Random, tokens: int, others: Callable[[], int]) -> None:
        """Add about so many tokens, at least, of conversations about other pictures.

        Args:
            sample: to add to.
            random: chooses.
            tokens: at least, if more than 0.
            others: the index of another picture.
        """
        end = len(sample.ids) + tokens
        while len(sample.ids) < end:
            index = others()
            self.show(sample, index)
            self.ask(sample, index, random)

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
