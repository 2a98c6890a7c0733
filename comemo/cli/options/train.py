"""Options of `comemo train`."""

import argparse
from collections.abc import Sequence

OPTIONS = ("--check", "--print", "--debug", "--help", "-h")
EXAMPLES = """\
A setting has the name that it has in the file, or, if it belongs to a stage, its last part
for all stages that run:

  comemo train mine.yaml
  comemo train mine.yaml learning_rate=1e-5 stages.finetune.steps=500 --data.workers 2
  comemo train mine.yaml --check        read the data and tell what a run would do
  comemo train mine.yaml --print        show all settings, with their defaults

The same command resumes a run that was stopped. Flags of transformers' TrainingArguments and
of the published script are translated or refused, each by name. On several GPUs:

  torchrun --nproc-per-node 8 -m comemo train mine.yaml
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of the command; `split_words` takes the settings out before."""
    parser.usage = "%(prog)s [CONFIG.yaml] [name=value | --name value ...] [--check] [--print]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    parser.add_argument("--check", action="store_true", help="read the data, train nothing")
    parser.add_argument("--print", action="store_true", help="show the settings, train nothing")
    parser.set_defaults(words=[])


def split_words(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate the options of the command from file and settings, which argparse does not know.

    Args:
        argv: the words after `comemo train`.

    Returns:
        options: words for `argparse`.
        words: all others.
    """
    return [w for w in argv if w in OPTIONS], [w for w in argv if w not in OPTIONS]
