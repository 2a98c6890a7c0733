"""Options of `generate` for an answer as text: which act, which are refused before any work."""

import threading

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor

from comemo import ChatSession

GREEDY = {"max_new_tokens": 8, "do_sample": False}


class Locked(LogitsProcessor):
    """Changes nothing, and cannot be copied."""

    def __init__(self):
        self.lock = threading.Lock()

    def __call__(self, input_ids, scores):
        with self.lock:
            return scores


@pytest.fixture
def ways(model, tokenizer, processor):
    """Calls of chat and of a session with these options."""

    def asking(options):
        return (
            lambda: model.chat(tokenizer, None, "who is on the boat?", options),
            lambda: ChatSession(model, processor).ask("who is on the boat?", **options),
            lambda: ChatSession(model, processor, **options).ask("who is on the boat?"),
        )

    return asking


@pytest.fixture
def never(model, monkeypatch):
    def run(*_, **__):
        raise AssertionError("the model was asked")

    monkeypatch.setattr(type(model), "forward", run)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"return_dict_in_generate": True}, "return_dict_in_generate .the answer is text"),
        ({"output_scores": True}, "output_scores"),
        ({"output_logits": True}, "output_logits"),
        ({"output_attentions": True}, "output_attentions"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens .it needs"),
        ({"assistant_model": object()}, "assistant_model .it needs"),
        ({"use_cache": False}, "use_cache=False"),
        ({"generation_config": GenerationConfig(use_cache=False)}, "use_cache=False"),
        ({"generation_config": GenerationConfig(output_scores=True)}, "output_scores"),
        ({"input_ids": torch.ones(1, 1)}, "input_ids .a chat makes it"),
        ({"cache": object()}, "cache .a chat makes it"),
        ({"image_memory": object()}, "image_memory .a chat makes it"),
    ],
)
def test_what_gives_no_one_text_is_refused_before_the_work(ways, never, options, told):
    for ask in ways(options):
        with pytest.raises(ValueError, match=rf"^(chat|ChatSession.*): wanted options.*{told}"):
            ask()


def test_a_generation_config_is_taken_as_it_is(model, tokenizer, never):
    chosen = GenerationConfig(return_dict_in_generate=True)
    with pytest.raises(ValueError, match="return_dict_in_generate"):
        model.chat(tokenizer, None, "hello", chosen)


def test_options_are_not_copied(ways):
    options = GREEDY | {"logits_processor": [Locked()]}
    wanted = [ask() for ask in ways(GREEDY)]
    assert [ask() for ask in ways(options)] == wanted
    assert options.keys() == {*GREEDY, "logits_processor"}


def test_stop_strings_need_no_tokenizer(ways):
    whole = {ask() for ask in ways(GREEDY | {"max_new_tokens": 40})}
    assert len(whole) == 1
    answer = whole.pop()
    stop = answer[3:5]
    options = GREEDY | {"max_new_tokens": 40, "stop_strings": [stop]}
    for ask in ways(options):
        found = ask()
        assert found.endswith(stop)
        assert answer.startswith(found)
        assert len(found) < len(answer)


def test_defaults_of_the_model_are_for_generate(model, ways, monkeypatch):
    wanted = [ask() for ask in ways(GREEDY)]
    monkeypatch.setattr(model.generation_config, "return_dict_in_generate", True)
    monkeypatch.setattr(model.generation_config, "output_scores", True)
    assert [ask() for ask in ways(GREEDY)] == wanted


def test_the_last_answer_stands_where_an_option_is_refused(model, processor):
    session = ChatSession(model, processor, **GREEDY)
    answer = session.ask("who is on the boat?")
    for verb in (lambda **o: session.ask("and now?", **o), session.regenerate):
        with pytest.raises(ValueError, match="use_cache=False"):
            verb(use_cache=False)
    assert session.history == [("who is on the boat?", answer)]
    assert session.regenerate() == answer
