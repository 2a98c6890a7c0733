"""Options of `generate` for an answer as text: checked before any work."""

from typing import Any

from comemo.decode.interface import DRAFTS, GeneratingModel
from comemo.decode.loop import check_loop
from comemo.generation_inputs import PROMPT_INPUTS
from comemo.tokenizer import InternLM2Tokenizer

NEED_IDS = (*DRAFTS, "custom_generate")
OUTPUTS = (
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
)
# Inputs that a chat makes itself.
INPUTS = (*PROMPT_INPUTS, "prefilled")


def text_options(
    verb: str, options: dict[str, Any], model: GeneratingModel, tokenizer: InternLM2Tokenizer
) -> dict[str, Any]:
    """Options for one answer as text.

    Args:
        verb: the function to name.
        options: of `generate`; neither changed nor deep-copied.
        model: whose `generation_config` has the defaults.
        tokenizer: passed on if `stop_strings` need it.

    Returns:
        The options to call `generate` with.

    Raises:
        ValueError: options that would not give one text, or inputs that a chat makes itself.
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
    # Outputs that the model's own defaults ask for are not wanted here.
    return options | {
        name: False for name in OUTPUTS if getattr(model.generation_config, name, None)
    }
