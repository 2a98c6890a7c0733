"""The recorded answers of comemo-nano, and that every way to ask gives the same words.

`write_nano_words.py` records them.
"""

import pytest
import torch
from harness import LOGITS
from nano_words import (
    BEAMS,
    GREEDY,
    by_chat,
    by_generate,
    by_session,
    candidates,
    conversation,
    digest_of,
    inputs_of,
    load,
    messages_of,
    read_record,
)
from transformers import pipeline

import comemo
from comemo import nano

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.no_virtual_gpu("the words were recorded on a CPU"),
]
RECORD = read_record()
CASES = RECORD["cases"]
FEW = list({str(case["pictures"]): case for case in CASES}.values())  # one of each picture
THREE = [FEW[0], FEW[-2], FEW[-1]]  # a picture, two pictures, text alone
WITH_BEAMS = [case for case in CASES if "beams" in case]
MOST = 6_000_000  # bytes of the checkpoint
RIGHT = 0.8  # of the recorded answers, at least
BATCH = 8


@pytest.fixture(scope="module")
def seeing():
    return load()


def words(cases, key="answer"):
    return [case[key].strip() for case in cases]


def test_the_checkpoint_is_small_and_in_the_published_layout():
    files = {path.name: path.stat().st_size for path in nano.checkpoint().iterdir()}
    assert sum(files.values()) <= MOST
    wanted = {"config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"}
    assert wanted <= files.keys()
    assert not [
        name for name in files if not name.endswith((".json", ".safetensors", ".model", ".jinja"))
    ]


def test_the_record_asks_the_fixed_questions():
    """About pictures that are still drawn as they were."""
    known = [case for _, group in candidates() for case in group]
    for case in CASES:
        assert {key: case[key] for key in ("pictures", "question", "truth")} in known
    for case in FEW:
        assert case["pixels"] == digest_of(case), "drawn otherwise: run write_nano_words.py"
    assert 25 <= len(CASES) <= 35
    assert {len(case["pictures"]) for case in CASES} == {0, 1, 2}


def test_most_recorded_answers_are_right():
    told = [case for case in CASES if case["truth"] is not None]
    right = sum(case["answer"] == case["truth"] for case in told)
    assert right >= RIGHT * len(told)


@pytest.mark.parametrize(
    "cases", [CASES[::3], pytest.param(CASES, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_batches_of_unequal_prompts(cases, seeing):
    """Padded on the left; a picture that comes again costs no vision work."""
    store = comemo.MemoryStore()
    for start in range(0, len(cases), BATCH):
        batch = cases[start : start + BATCH]
        assert by_generate(*seeing, batch, memory_store=store) == words(batch)
    assert store.stats.misses == len({str(one) for case in cases for one in case["pictures"]})


@pytest.mark.parametrize("ask", [by_chat, by_session])
def test_one_question_at_a_time(ask, seeing):
    assert [ask(*seeing, case) for case in THREE] == words(THREE)


@pytest.mark.slow
@pytest.mark.parametrize("ask", [by_chat, by_session])
def test_every_question_at_a_time(ask, seeing):
    assert [ask(*seeing, case) for case in CASES] == words(CASES)


def test_logits_of_the_first_word(seeing):
    model, processor = seeing
    for case in THREE:
        with torch.no_grad():
            logits = model(**inputs_of(processor, [case]), logits_to_keep=1).logits[0, -1]
        tokens, recorded = zip(*case["first"], strict=True)
        assert logits.topk(len(tokens)).indices.tolist() == list(tokens)
        assert (logits[list(tokens)] - torch.tensor(recorded)).abs().max() < LOGITS


def test_a_pipeline():
    """As people write it: from the directory alone."""
    pipe = pipeline("image-text-to-text", model=str(nano.checkpoint()), dtype=torch.float32)
    for case in THREE[:2]:
        (told,) = pipe(text=messages_of(case), generate_kwargs=GREEDY)
        assert told["generated_text"][-1]["content"].strip() == case["answer"]


def test_a_known_picture(seeing, tmp_path):
    """A second session reads the image memory that the first has stored, and sees no pixels."""
    case = FEW[0]
    first, second = (comemo.MemoryStore(directory=tmp_path) for _ in range(2))
    assert by_session(*seeing, case, memory_store=first) == case["answer"]
    assert (first.stats.misses, first.stats.disk_hits) == (1, 0)
    assert by_session(*seeing, case, memory_store=second) == case["answer"]
    assert (second.stats.misses, second.stats.disk_hits) == (0, 1)


def test_a_decode_loop(seeing):
    loop = comemo.DecodeLoop(seeing[0])
    assert by_session(*seeing, FEW[0], decode_loop=loop) == FEW[0]["answer"]
    assert by_generate(*seeing, THREE, decode_loop=loop) == words(THREE)


def test_beams(seeing):
    """A picture and two pictures, one after the other and in a batch."""
    assert len(WITH_BEAMS) == 2
    recorded = words(WITH_BEAMS, "beams")
    assert [by_session(*seeing, case, **BEAMS) for case in WITH_BEAMS] == recorded
    assert by_generate(*seeing, WITH_BEAMS, **BEAMS) == recorded


def test_a_conversation(seeing):
    """By a session, and by `chat` with the history."""
    kept, case = RECORD["conversation"], CASES[0]
    assert conversation(*seeing, case, kept["questions"]) == kept["answers"]
    history = [("<image>\n" + kept["questions"][0], kept["answers"][0])]
    for question, answer in list(zip(kept["questions"], kept["answers"], strict=True))[1:]:
        asked = case | {"question": question}
        assert by_chat(*seeing, asked, history=history) == answer
        history.append((question, answer))
