"""Which attention a model uses: by a user's choice, never by a checkpoint's."""

import copy
import json

import pytest
from small import make_model, make_prompts
from transformers import AttentionInterface, AutoModel

from comemo import CoMemoConfig, CoMemoForConditionalGeneration

pytestmark = pytest.mark.usefixtures("one_thread")
OURS = "comemo_kernels"


def of_a_user(module, query, key, value, attention_mask, **kwargs):
    raise NotImplementedError("only chosen, never called")


AttentionInterface.register("chosen_by_a_user", of_a_user)


@pytest.fixture
def model():
    return make_model()


def choose(model, name):
    model.set_attn_implementation({"mixin_config": name})


def names_of(model):
    config = model.config
    parts = config.text_config, config.vision_config, config.mixin_config
    return [part._attn_implementation for part in parts]


def test_a_plain_name_does_not_reach_mixin_layers(model):
    assert names_of(model) == ["sdpa", "sdpa", OURS]
    model.set_attn_implementation("eager")
    assert names_of(model) == ["eager", "eager", OURS]
    choose(model, "chosen_by_a_user")
    model.set_attn_implementation("sdpa")
    assert names_of(model) == ["sdpa", "sdpa", "chosen_by_a_user"]
    assert names_of(copy.deepcopy(model)) == ["sdpa", "sdpa", "chosen_by_a_user"]
    choose(model.model, "eager")
    assert names_of(model) == ["sdpa", "sdpa", "eager"]
    choose(model, OURS)
    assert names_of(model) == ["sdpa", "sdpa", OURS]


def test_from_pretrained_chooses(model, tmp_path):
    choose(model, "eager")
    model.save_pretrained(tmp_path)
    load = CoMemoForConditionalGeneration.from_pretrained
    assert names_of(load(tmp_path)) == ["sdpa", "sdpa", OURS]  # a choice is not saved
    own = {"mixin_config": "eager"}
    assert names_of(load(tmp_path, attn_implementation=own)) == ["sdpa", "sdpa", "eager"]
    own = {"mixin_config": "chosen_by_a_user", "text_config": "eager"}
    assert names_of(AutoModel.from_pretrained(tmp_path, attn_implementation=own)) == [
        "eager",
        "sdpa",
        "chosen_by_a_user",
    ]
    assert names_of(load(tmp_path, attn_implementation="eager")) == ["eager", "eager", OURS]
    for wrong in (
        {"mixin_config": "none such"},
        {"mixin": "sdpa"},
        {"mixin_config": "paged|eager"},
    ):
        with pytest.raises(ValueError, match=r"none such|must have keys|a memory of its own"):
            load(tmp_path, attn_implementation=wrong)


def test_a_checkpoint_does_not_choose(model, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["mixin_config"] |= {"attn_implementation": "sdpa", "_attn_implementation": "sdpa"}
    config["mixin_config"]["_attn_implementation_internal"] = "sdpa"
    config["attn_implementation"] = config["_attn_implementation"] = {"mixin_config": "eager"}
    path.write_text(json.dumps(config))
    loaded = CoMemoForConditionalGeneration.from_pretrained(tmp_path)
    assert names_of(loaded) == ["sdpa", "sdpa", OURS]
    assert CoMemoConfig.from_pretrained(tmp_path).mixin_config._attn_implementation is None


def test_wrong_names_change_nothing(model):
    for wrong, error in (
        ({"mixin_config": "none such"}, "none such"),
        ({"mixin_config": "paged|eager"}, "a memory of its own, got 'paged|eager'"),
        ({"mixin": "sdpa"}, r"must have keys of .*got \['mixin'\]"),
        (OURS, "must be for 'mixin_config', got .*not a KV cache by a causal mask"),
        ({"text_config": OURS}, r"must be for 'mixin_config', got \['text_config'\]"),
        ({"vision_config": OURS}, r"must be for 'mixin_config', got \['vision_config'\]"),
    ):
        with pytest.raises(ValueError, match=error):
            model.set_attn_implementation(wrong)
        assert names_of(model) == ["sdpa", "sdpa", OURS]


def test_ours_is_not_a_self_attention(model):
    model.model.vision_tower.set_attn_implementation(OURS)  # transformers' own class
    with pytest.raises(ValueError, match="spans must say which keys a query reads, got None"):
        model(**make_prompts(model))
