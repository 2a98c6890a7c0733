"""Options of `generate` where an answer is text: what can be done, and what is refused before."""

from typing import Any

from comemo.decode.loop import check_loop
from comemo.generation_inputs import DRAFTS

NEED_IDS = (*DRAFTS, "custom_generate")
OUTPUTS = (
    *("return_dict_in_generate", "output_scores", "output_logits"),
    *("output_attentions", "output_hidden_states"),
)
# What a chat makes itself.
INPUTS = (
    *("inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids", "pixel_values"),
    *("tile_grid", "image_memory", "cache", "past_key_values", "prompt_output", "memory_store"),
)


def text_options(verb: str, options: dict[str, Any], model: Any, tokenizer: Any) -> dict[str, Any]:
    """Options for one answer as text.

    Args:
        verb: the function to name.
        options: what `generate` takes; neither changed nor copied in depth.
        model: whose `generation_config` fills in what is not given.
        tokenizer: handed over where `stop_strings` need one.

    Returns:
        The options to call `generate` with.

    Raises:
        ValueError: options that would answer otherwise than by one text, or that a chat makes
            itself.
    """
    chosen = options.get("generation_config")

    def given(name: str) -> Any:
        value = options.get(name)
        return getattr(chosen, name, None) if value is None and chosen is not None else value

    def option(name: str) -> Any:
        value = given(name)
        return getattr(model.generation_config, name, None) if value is None else value

    reasons = [f"{name} (a chat makes it)" for name in INPUTS if name in options]
    reasons += [f"{name} (the answer is text)" for name in OUTPUTS if given(name)]
    reasons += [
        f"{name} (it needs the prompt as ids)"
        for name in NEED_IDS
        if option(name) is not None and option(name) is not False
    ]
    if option("use_cache") is False:
        reasons.append("use_cache=False (the prompt is read once)")
    if (option("num_return_sequences") or 1) > 1:
        reasons.append(f"num_return_sequences={option('num_return_sequences')} (one is returned)")
    if reasons:
        raise ValueError(
            f"{verb}: wanted options of generate that give one text, got {', '.join(reasons)}:"
            " call generate with what the processor or prepare_chat returns"
        )
    if options.get("decode_loop") is not None:
        check_loop(verb, model, options["decode_loop"], option)
    options = dict(options)
    if option("stop_strings") is not None:
        options.setdefault("tokenizer", tokenizer)
    # A model's own defaults are for generate.
    return options | {
        name: False for name in OUTPUTS if getattr(model.generation_config, name, None)
    }
