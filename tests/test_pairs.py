"""Pairs of features: every two values that can be combined, in conversations and alone.

Each row works, as the same row without whatever changes nothing, or is one `ValueError` that names
what excludes each other, before anything is computed.
"""

import contextlib
import itertools

import pytest
import torch
from small import make_model, make_prompts

from bench.counting import count_calls
from comemo import ChatSession, DecodeLoop, MemoryStore

pytestmark = pytest.mark.usefixtures("one_thread")
HOW = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 2.0},
    "beams": {"do_sample": False, "num_beams": 2},
    "drafts": {"do_sample": False, "prompt_lookup_num_tokens": 2},
}
SHARED = {
    "how": tuple(HOW),
    "store": (False, True),
    "loop": (None, "loop", "static"),
    "fold": (False, True),
    "chunk": (None, 20),
    "dtype": (torch.float32, torch.bfloat16),
    "rope": ("dhr", "original"),
    "positions": ("raw", "compressed"),
    "memory_positions": ("relative", "absolute"),
}
TALKS = SHARED | {"visibility": ("causal", "all"), "fork": (False, True)}
TALKS |= {"how": ("greedy", "sampled", "beams"), "loop": (None, "loop")}  # options of a question
CALLS = SHARED | {"prompts": (1, 2), "given": ("pixels", "memory")}
MECHANICS = {"store": False, "loop": None, "fold": False, "chunk": None, "fork": False}


def why_refused(row):
    """Text that the error must contain, or None if the row is supported."""
    if row.get("store") and row.get("memory_positions") == "absolute":
        return "memory_positions"
    if row.get("loop") == "loop" and row.get("how") in ("beams", "drafts"):
        return "num_beams" if row["how"] == "beams" else "prompt_lookup_num_tokens"
    if row.get("how") == "drafts" and row.get("prompts") == 2:
        return "2 prompts"
    if row.get("how") == "drafts" and row.get("loop") == "static":
        return "cache_implementation='static'"
    return None


def rows_of(axes):
    """Rows in which every two values of different axes occur together; refused pairs separately."""
    pairs = [
        dict(pair)
        for a, b in itertools.combinations(axes, 2)
        for pair in itertools.product([(a, v) for v in axes[a]], [(b, v) for v in axes[b]])
    ]
    plain = {name: values[0] for name, values in axes.items()}
    rows = [plain | pair for pair in pairs if why_refused(pair)]
    unmet = [pair for pair in pairs if not why_refused(pair)]
    while unmet:
        row = dict(unmet[0])
        for name in axes:
            possible = [v for v in axes[name] if not why_refused(row | {name: v})]
            if name not in row:
                row[name] = max(possible, key=lambda v: _met(unmet, row | {name: v}))
        unmet = [pair for pair in unmet if not pair.items() <= row.items()]
        rows.append({name: row[name] for name in axes})
    return rows


def _met(pairs, row):
    return sum(pair.items() <= row.items() for pair in pairs)


def named(row):
    return "-".join(str(value).removeprefix("torch.") for value in row.values())


@pytest.fixture(scope="module")
def models(processor):
    """By dtype."""
    token = processor.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    made = {}
    for dtype in SHARED["dtype"]:
        made[dtype] = make_model(dtype, vocab_size=600)
        made[dtype].config.image_token_id = token
    return made


@pytest.fixture
def model_of(models, monkeypatch):
    def choose(row):
        model = models[row["dtype"]]
        monkeypatch.setattr(model.config, "decode_positions", row["positions"])
        monkeypatch.setattr(model.config, "memory_positions", row["memory_positions"])
        return model

    return choose


def options_for(row, model):
    options = {"max_new_tokens": 4, **HOW[row["how"]]}
    if row["store"]:
        options["memory_store"] = MemoryStore()
    if row["loop"] == "loop":
        options["decode_loop"] = DecodeLoop(model)
    elif row["loop"] == "static":
        options["cache_implementation"] = "static"
    return options


def pictures():
    draw = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 3, 112, 112, generator=draw), g) for n, g in ((1, (1, 1)), (3, (2, 1)))]


def talk(row, model, processor):
    """A conversation with an image, another one, the first again, and a question after it."""
    torch.manual_seed(0)
    names = {name: row[name] for name in ("rope", "visibility")}
    session = ChatSession(
        model,
        processor,
        prefill_chunk_size=row["chunk"],
        **names,
        **options_for(row, model),
    )
    one, other = pictures()
    session.ask("hello")
    session.ask("what is this?", one)
    if row["fork"]:
        session = session.fork()
    for question, image in (("and <image> this", other), ("again", one), ("and so on?", None)):
        session.ask(question, image)
    return session


@pytest.mark.parametrize("row", rows_of(TALKS), ids=named)
def test_conversations(model_of, processor, row):
    model = model_of(row)
    refused = why_refused(row)
    if refused:
        with (
            count_calls([model.model], "project_images") as seen,
            pytest.raises(ValueError, match=f"{refused}"),
        ):
            talk(row, model, processor)
        assert seen[0] == 0
        return
    wanted = talk(row | MECHANICS, model, processor)
    with folded(model, row):
        found = talk(row, model, processor)
    if row["dtype"] == torch.float32:
        assert found.history == wanted.history
    if found.history == wanted.history:
        tokens = found.report.prompt_tokens
        for a, b in zip(found._held.cache.layers, wanted._held.cache.layers, strict=True):
            assert_close(a.keys[:, :, :tokens], b.keys[:, :, :tokens])


@pytest.mark.parametrize("row", rows_of(CALLS), ids=named)
def test_calls(model_of, row):
    model = model_of(row)
    batch = make_prompts(model)
    if row["prompts"] == 1:
        batch |= {name: batch[name][1:] for name in ("input_ids", "attention_mask")}
        batch |= {"pixel_values": batch["pixel_values"][1:], "tile_grid": [(1, 1)] * 2}
    if row["rope"] == "original":
        batch["tile_grid"] = None
    if row["given"] == "memory" and not row["store"]:
        memory = model(**batch, use_cache=True).image_memory
        del batch["pixel_values"]
        batch["image_memory"] = memory

    def answer(row):
        torch.manual_seed(0)
        options = options_for(row, model)
        if row["chunk"]:
            options["prefill_chunk_size"] = row["chunk"]
        return model.generate(**batch, **options, return_dict_in_generate=True, output_logits=True)

    if refused := why_refused(row):
        with (
            count_calls([model.model], "project_images") as seen,
            pytest.raises(ValueError, match=refused),
        ):
            answer(row)
        assert seen[0] == 0
        return
    wanted = answer(row | MECHANICS)
    with folded(model, row):
        found = answer(row)
    if row["dtype"] == torch.float32:
        assert torch.equal(found.sequences, wanted.sequences)
    assert_close(found.logits[0].to(row["dtype"]), wanted.logits[0].to(row["dtype"]))


@contextlib.contextmanager
def folded(model, row):
    handle = model.fold_for_inference() if row["fold"] else None
    try:
        yield
    finally:
        if handle is not None:
            handle.undo()


def assert_close(found, wanted):
    tolerance = 1e-4 if wanted.dtype == torch.float32 else 0.2
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
