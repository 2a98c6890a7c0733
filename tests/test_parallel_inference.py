"""Models that ranks divide for inference: the tokens of one process, and its files."""

import pytest
import torch
from conftest import SLOW
from harbour import draw_harbour
from rank_processes import run_ranks
from safetensors.torch import load_file
from small import make_model, make_prompts
from torch import distributed as dist
from transformers import AutoModelForImageTextToText, pipeline

from comemo import CoMemoForConditionalGeneration, CoMemoModel, DecodeLoop, MemoryStore
from comemo.chat.session import ChatSession
from comemo.parallel.stages import stage_of

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.no_virtual_gpu("ranks are forks on the CPU"),
]
DIVISIONS = [
    (2, {"tp_plan": "auto"}),
    (2, {"distributed_config": {"pp_size": 2}}),
    pytest.param(4, {"distributed_config": {"pp_size": 2, "tp_size": 2}}, marks=SLOW),
    pytest.param(4, {"tp_plan": "auto", "tp_size": 2}, marks=SLOW),  # two copies
]


@pytest.fixture(scope="module")
def photo():
    return draw_harbour().resize((500, 300))


def load(path, options):
    return CoMemoForConditionalGeneration.from_pretrained(path, dtype=torch.float32, **options)


def talk(model, processor, photo, **options):
    """Answers of a conversation, and of one that finds its picture in the store."""
    store = MemoryStore()
    options |= {"max_new_tokens": 5, "do_sample": False, "memory_store": store}
    session = ChatSession(model, processor, **options)
    answers = [session.ask("What?", [photo]), session.ask("And then?"), session.ask("Hm", [photo])]
    again = ChatSession(model, processor, **options).ask("What?", [photo])
    return [*answers, again], store.stats.hits, store.stats.misses


@pytest.fixture(scope="module")
def wanted(checkpoint, processor, photo):
    return talk(load(checkpoint, {}), processor, photo)


@pytest.mark.parametrize(("count", "options"), DIVISIONS)
def test_conversations_are_those_of_one_process(
    checkpoint, processor, photo, wanted, count, options, tmp_path
):
    """Also with a decode loop; and the files that are saved are the published ones, bit for bit."""

    def on_rank():
        model = load(checkpoint, options)
        found = [talk(model, processor, photo)]
        if "pp_size" not in options.get("distributed_config", {}):
            found.append(talk(model, processor, photo, decode_loop=DecodeLoop(model)))
        model.save_pretrained(tmp_path / "saved")
        return found, sum(p.numel() for p in model.parameters())

    whole = sum(p.numel() for p in load(checkpoint, {}).parameters())
    for found, numbers in run_ranks(count, on_rank):
        assert all(each == wanted for each in found)
        assert numbers < 0.7 * whole
    before = load_file(checkpoint / "model.safetensors")
    after = load_file(tmp_path / "saved" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], weight.float()) for name, weight in before.items())


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """A model of 4 heads under the names used here, in shards."""
    folder = tmp_path_factory.mktemp("native")
    model = make_model(heads=4, vocab_size=301).cpu()
    model.save_pretrained(folder, save_original_format=False, max_shard_size="200KB")
    return folder


@pytest.mark.parametrize("beams", [1, pytest.param(2, marks=SLOW)])
def test_batches_and_logits(native, beams):
    """Prompts with other images in a batch; words that the ranks cannot share equally."""
    whole = load(native, {})
    prompts = {n: x.cpu() if hasattr(x, "cpu") else x for n, x in make_prompts(whole).items()}
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    with torch.no_grad():
        logits = whole(**prompts).logits
    tokens = whole.generate(**prompts, **options)

    def on_rank():
        model = load(native, {"tp_plan": "auto"})
        with torch.no_grad():
            own = model(**prompts).logits
        memory = model.model.build_image_memory(
            prompts["pixel_values"],
            prompts["input_ids"] == model.config.image_token_id,
            torch.arange(prompts["input_ids"].shape[1]).expand(2, -1),
            prompts["tile_grid"],
            MemoryStore(),
        )
        heads = {key.shape[1] for key in memory.keys.values()}
        return own, model.generate(**prompts, **options), heads

    for own, found, heads in run_ranks(2, on_rank):
        assert (own - logits).abs().max() < 2e-4
        assert torch.equal(found, tokens)
        assert heads == {2}


def test_a_picture_that_one_rank_has_forgotten_is_computed_by_all(native, tmp_path):
    """Otherwise ranks would wait for each other in the vision tower."""
    whole = load(native, {})
    prompts = {n: x.cpu() if hasattr(x, "cpu") else x for n, x in make_prompts(whole).items()}
    wanted = whole.generate(**prompts, max_new_tokens=4, do_sample=False)

    def on_rank():
        model = load(native, {"tp_plan": "auto"})
        store, found = MemoryStore(directory=tmp_path / "store"), []
        for _ in range(2):
            found.append(
                model.generate(**prompts, memory_store=store, max_new_tokens=4, do_sample=False)
            )
            if dist.get_rank() == 1:
                store.clear()
                keys = {path.stem for path in (tmp_path / "store").glob("*")}
                mine = [key for key in store if key in keys]
                dist.barrier()
                if mine:
                    next((tmp_path / "store").glob(f"{mine[0]}*")).unlink()
            else:
                dist.barrier()
        return found

    for found in run_ranks(2, on_rank):
        assert all(torch.equal(tokens, wanted) for tokens in found)


def test_folded_parts_answer_the_same(native):
    whole = load(native, {}).requires_grad_(False)
    prompts = {n: x.cpu() if hasattr(x, "cpu") else x for n, x in make_prompts(whole).items()}

    def on_rank():
        model = load(native, {"tp_plan": "auto"})
        with torch.no_grad():
            before = model(**prompts).logits
            with model.fold_for_inference():
                folded = model(**prompts).logits
            after = model(**prompts).logits
        return (folded - before).abs().max().item(), torch.equal(before, after)

    for difference, same in run_ranks(2, on_rank):
        assert 0 < difference < 1e-3
        assert same


def test_auto_classes_and_pipelines_divide(checkpoint):
    talk = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]

    def answer(options):
        kind = {"dtype": torch.float32, **options}
        model = AutoModelForImageTextToText.from_pretrained(checkpoint, **kind)
        asks = pipeline("image-text-to-text", model=str(checkpoint), model_kwargs=kind)
        answers = asks(talk, max_new_tokens=3, do_sample=False)
        return model.model.split is not None, answers[0]["generated_text"][-1]

    divided, wanted = answer({})
    assert not divided
    assert run_ranks(2, answer, {"tp_plan": "auto"}) == [(True, wanted)] * 2


def refuses(options, message, cls=CoMemoForConditionalGeneration):
    def on_rank(path):
        with pytest.raises(ValueError, match=message):
            cls.from_pretrained(path, **options)
        return True

    return on_rank


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tp_plan": {"layers.*.mlp": "colwise"}}, "tp_plan must be 'auto'"),
        ({"tp_plan": "auto", "device_map": "auto"}, "tp_plan and device_map exclude each other"),
        ({"tp_plan": "auto", "tp_size": 3}, "tp_size 3 times pp_size 1 must divide .* got 2"),
        ({"tp_size": 0}, "tp_size must be a positive number of ranks, got 0"),
        ({"distributed_config": {"fsdp_size": 2}}, "got {'fsdp_size': 2}: for training"),
        ({"distributed_config": {"pp_size": 2}, "tp_plan": "auto"}, "give either"),
        ({"tp_plan": "auto", "quantization_config": {"a": 1}}, "exclude each other"),
        ({"tp_plan": "auto", "max_memory": {0: 1}}, r"got \['max_memory'\]"),
    ],
)
def test_options_that_do_not_fit(native, options, message):
    assert run_ranks(2, refuses(options, message), native) == [True, True]


def test_models_that_do_not_fit(native, tmp_path):
    four = refuses({"tp_plan": "auto"}, r"must be one of \[1, 2\], got 4 for 2 key heads")
    assert run_ranks(4, four, native) == [True] * 4
    base = refuses({"tp_plan": "auto"}, "only a model with an output layer", CoMemoModel)
    assert run_ranks(2, base, native) == [True, True]
    many = refuses({"distributed_config": {"pp_size": 5}}, "at most the number of layers, 4, got 5")
    assert run_ranks(5, many, native) == [True] * 5
    make_model(heads=4, vocab_size=301, num_hidden_layers=2).cpu().config.save_pretrained(tmp_path)
    for file in native.glob("*.safetensors*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    unexpected = refuses({"tp_plan": "auto"}, r"unexpected_keys: .*layers\.3\.")
    assert run_ranks(2, unexpected, tmp_path) == [True, True]


PARTIAL = {
    "add_adapter": lambda model: model.add_adapter(None),
    "load_adapter": lambda model: model.load_adapter("nowhere"),
    "resize_token_embeddings": lambda model: model.resize_token_embeddings(400),
    "output_attentions": lambda model: model(torch.ones(1, 3).long(), output_attentions=True),
}


@pytest.mark.parametrize("options", [{"tp_plan": "auto"}, {"distributed_config": {"pp_size": 2}}])
def test_what_needs_the_whole_model_is_refused(native, options):
    """Not answered with the part of a rank."""

    def on_rank():
        model = load(native, options)
        for verb, call in PARTIAL.items():
            with pytest.raises(ValueError, match=f"{verb}: wanted a whole model"):
                call(model)
        ids = torch.ones(1, 3).long()
        if "tp_plan" in options:
            return len(model(ids, output_hidden_states=True).hidden_states)
        with pytest.raises(ValueError, match="output_hidden_states: wanted a whole model"):
            model(ids, output_hidden_states=True)
        return 5

    assert run_ranks(2, on_rank) == [5, 5]


def test_a_single_process_is_told_how_to_start(native, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="torchrun --nproc-per-node N, got a single process"):
        load(native, {"tp_plan": "auto"})


@pytest.mark.parametrize(("layers", "stages"), [(24, 5), (4, 4), (7, 2), (3, 1)])
def test_stages_have_layers_in_order_and_about_as_many(layers, stages):
    places = [stage_of(layer, layers, stages) for layer in range(layers)]
    assert places == sorted(places)
    counts = [places.count(stage) for stage in range(stages)]
    assert max(counts) - min(counts) <= 1
    assert min(counts) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_prefill_and_cache_are_one_graph(native, count):
    """The whole forward, with the image memory that is built in it, and its all-reduces."""

    def on_rank():
        model = load(native, {"tp_plan": "auto"} if count > 1 else {})
        prompts = {n: x.cpu() if hasattr(x, "cpu") else x for n, x in make_prompts(model).items()}
        with torch.no_grad():
            wanted = model(**prompts, use_cache=True)
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            found = compiled(**prompts, use_cache=True)
        kept = found.image_memory.keys[1] - wanted.image_memory.keys[1]
        return (found.logits - wanted.logits).abs().max().item(), kept.abs().max().item()

    for logits, keys in run_ranks(count, on_rank, patience=120):
        assert logits < 1e-4
        assert keys < 1e-4
