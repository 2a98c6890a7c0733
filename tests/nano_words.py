"""Fixed questions to comemo-nano, and every way to ask them.

`write_nano_words.py` records the answers, `test_nano_answers.py` holds them.
"""

import functools
import hashlib
import json
from pathlib import Path
from random import Random

import torch

import comemo
from comemo import nano, prompts
from comemo.nano.drawing import draw
from comemo.nano.questions import KINDS, questions_about, questions_about_pair
from comemo.nano.scenes import SEEDS, make_pair, make_scene

RECORD = Path(__file__).parent / "data" / "nano_answers.json"
LONGEST = 40  # tokens of an answer
GREEDY = {"max_new_tokens": LONGEST, "do_sample": False}
BEAMS = {"max_new_tokens": LONGEST, "do_sample": False, "num_beams": 3}
DEMO = SEEDS["demo"].start
# Number of a demo picture, its layout, and how many questions about it.
PICTURES = [
    (1, "objects", 5),
    (2, "objects", 5),
    (3, "sign", 4),
    (4, "chart", 4),
    (5, "form", 3),
    (6, "marks", 3),
]
PAIR, OF_PAIR = 7, 4
TURNS = 3  # of a conversation about the first picture
CLEAR = 0.02  # between the two best logits: answers with a smaller margin are not recorded


def load():
    """Model and processor, in float32 on the CPU."""
    path = nano.checkpoint()
    model = comemo.CoMemoForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    return model.eval(), comemo.CoMemoProcessor.from_pretrained(path)


def candidates():
    """Questions that may be recorded: lists of {"pictures", "question", "truth"}, and how many.

    A picture is [number, layout], the two halves of a pair are [number, "pair", index].
    """
    groups = []
    for number, layout, count in PICTURES:
        scene = make_scene(DEMO + number, layout)
        asked = questions_about(scene, Random(number))
        groups.append((count, _cases([[number, layout]], asked)))
    asked = questions_about_pair(*make_pair(DEMO + PAIR), Random(PAIR))
    groups.append((OF_PAIR, _cases([[PAIR, "pair", 0], [PAIR, "pair", 1]], asked)))
    groups.append((1, [{"pictures": [], "question": "Describe the picture.", "truth": None}]))
    return groups


def _cases(pictures, asked):
    """The kinds in turn, so that few questions are of many kinds."""
    asked = [question for question in asked if question.kind in KINDS]
    seen = dict.fromkeys(KINDS, 0)
    order = []
    for question in asked:
        order.append((seen[question.kind], list(KINDS).index(question.kind), question))
        seen[question.kind] += 1
    return [
        {"pictures": pictures, "question": question.text, "truth": question.answer}
        for *_, question in sorted(order, key=lambda entry: entry[:2])
    ]


@functools.cache
def _drawn(number, layout, half=0):
    if layout == "pair":
        return draw(make_pair(DEMO + number)[half])
    return draw(make_scene(DEMO + number, layout))


def pictures_of(case):
    return [_drawn(*picture) for picture in case["pictures"]]


def digest_of(case):
    """Of the pixels: other pixels are another question."""
    found = hashlib.sha256()
    for picture in pictures_of(case):
        found.update(picture.tobytes())
    return found.hexdigest()[:16]


def read_record():
    return json.loads(RECORD.read_text(encoding="utf-8"))


# --- ways to ask ---


def tiles_of(model, case):
    """What `chat` wants of the pictures: pixels, tiles of each, grids."""
    config = model.config
    loaded = [
        comemo.load_image(picture, config.force_image_size, config.max_dynamic_patch)
        for picture in pictures_of(case)
    ]
    if not loaded:
        return None, None, None
    pixels, grids = zip(*loaded, strict=True)
    return torch.cat(pixels), [len(own) for own in pixels], list(grids)


def marked(case):
    return f"{prompts.IMAGE_MARK}\n" * len(case["pictures"]) + case["question"]


def by_chat(model, processor, case, history=None, **options):
    pixels, counts, grids = tiles_of(model, case)
    return model.chat(
        processor.tokenizer,
        pixels,
        marked(case) if history is None else case["question"],
        GREEDY | options,
        history=history,
        num_patches_list=counts,
        target_aspect_ratio=grids,
    )


def by_session(model, processor, case, **options):
    session = comemo.ChatSession(model, processor, **(GREEDY | options))
    return session.ask(case["question"], pictures_of(case))


def messages_about(pictures, question):
    content = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def messages_of(case):
    return messages_about(pictures_of(case), case["question"])


def inputs_of(processor, cases):
    """Of several prompts, padded on the left."""
    return processor.apply_chat_template(
        [messages_of(case) for case in cases],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"padding": True},
    )


def by_generate(model, processor, cases, **options):
    """Answers to several prompts in one call."""
    inputs = inputs_of(processor, cases)
    tokens = model.generate(**inputs, **(GREEDY | options))
    own = tokens[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(own, skip_special_tokens=True)]


@torch.no_grad()
def logits_of(model, processor, case):
    """[tokens of the answer, vocabulary], of the greedy answer."""
    told = {"output_logits": True, "return_dict_in_generate": True}
    out = model.generate(**inputs_of(processor, [case]), **GREEDY, **told)
    return torch.cat(list(out.logits))


def conversation(model, processor, case, questions):
    """Answers of a session to several questions in turn; the pictures come with the first."""
    session = comemo.ChatSession(model, processor, **GREEDY)
    first = [session.ask(questions[0], pictures_of(case))]
    return first + [session.ask(question) for question in questions[1:]]
