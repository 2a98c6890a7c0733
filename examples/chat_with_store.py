"""Ask about an image twice, with image memories cached on disk.

`python examples/chat_with_store.py CHECKPOINT IMAGE STORE`: the second run skips the vision tower.
"""

import sys

import comemo


def main(checkpoint: str, image: str, directory: str) -> None:
    model = comemo.CoMemoForConditionalGeneration.from_pretrained(checkpoint).eval()
    processor = comemo.CoMemoProcessor.from_pretrained(checkpoint)
    store = comemo.MemoryStore(directory=directory)
    session = comemo.ChatSession(model, processor, memory_store=store, max_new_tokens=32)
    for question, images in (("What is in this image?", image), ("And what is below it?", None)):
        print(f"Q: {question}\nA: ", end="")
        for piece in session.stream(question, images):
            print(piece, end="", flush=True)
        report = session.report
        print(f"\n[{report.read_tokens} of {report.prompt_tokens} tokens read]")
    stats = store.stats
    print(f"store: {stats.hits} from memory, {stats.disk_hits} from disk, {stats.misses} computed")


if __name__ == "__main__":
    main(*sys.argv[1:])
