"""Commands of transformers that know this model: `python -m comemo.cli.transformers_cli serve DIR`.

`transformers serve` runs without importing CoMemo, and loads no class outside transformers, not
even with `--trust-remote-code`. It asks two tables of transformers: which model types an Auto class
loads, and which classes of models take images. No entry point and no option adds to them. So this
command adds CoMemo, and then runs theirs. `import comemo` does not: other programs keep the tables
as they are.
"""

import sys

from transformers import AutoModelForMultimodalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from comemo.conditional_generation import CoMemoForConditionalGeneration
from comemo.config import CoMemoConfig


def add_model() -> None:
    """Add CoMemo to the models that `transformers serve` loads, in this process."""
    name = CoMemoForConditionalGeneration.__name__
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[CoMemoConfig.model_type] = name
    AutoModelForMultimodalLM.register(CoMemoConfig, CoMemoForConditionalGeneration, exist_ok=True)


def main() -> None:
    """Run a command of transformers: `serve`, `chat`, and its others, with their own options.

    Raises:
        SystemExit: with the status of the command, or if a package that it needs is missing.
    """
    try:
        from transformers.cli.transformers import main as run
    except ImportError as error:
        sys.exit(f"comemo.cli.transformers_cli: the commands of transformers cannot run: {error}")
    add_model()
    run()


if __name__ == "__main__":
    main()
