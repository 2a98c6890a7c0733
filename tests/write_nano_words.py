"""Record what comemo-nano answers: python tests/write_nano_words.py

For a new checkpoint, or for pictures that are drawn otherwise. Look at the difference before you
commit it: `test_nano_answers.py` holds these words.
"""

import json

import torch
from nano_words import (
    BEAMS,
    CLEAR,
    RECORD,
    TURNS,
    by_session,
    candidates,
    conversation,
    digest_of,
    load,
    logits_of,
)

TOP = 5  # logits of the first token that are recorded


def record(model, processor):
    """Every fixed question whose answer is clear, with its answer."""
    cases = []
    for count, group in candidates():
        clear = 0
        for case in group:
            if clear == count:
                break
            logits = logits_of(model, processor, case)
            best = logits.topk(2).values
            margin = (best[:, 0] - best[:, 1]).min().item()
            if margin < CLEAR:
                continue  # another machine's rounding might turn it
            clear += 1
            top = logits[0].topk(TOP)
            case["answer"] = by_session(model, processor, case)
            case["pixels"] = digest_of(case)
            case["first"] = [
                [int(token), round(float(value), 4)] for value, token in zip(*top, strict=True)
            ]
            cases.append(case)
    of_pair = next(case for case in cases if len(case["pictures"]) == 2)
    for case in (cases[0], of_pair):
        case["beams"] = by_session(model, processor, case, **BEAMS)
    return cases


def main():
    torch.set_num_threads(1)
    model, processor = load()
    cases = record(model, processor)
    questions = [case["question"] for case in cases[:TURNS]]
    said = conversation(model, processor, cases[0], questions)
    kept = {"cases": cases, "conversation": {"questions": questions, "answers": said}}
    RECORD.parent.mkdir(exist_ok=True)
    text = json.dumps(kept, indent=1)
    RECORD.write_text(text + "\n", encoding="utf-8")
    right = sum(case["answer"] == case["truth"] for case in cases)
    print(f"{RECORD}: {len(cases)} answers, {right} of them right")
    for case in cases:
        print(f"{case['question']!r}: {case['answer']!r}, truth {case['truth']!r}")


if __name__ == "__main__":
    main()
