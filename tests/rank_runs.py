"""Whole training runs on forked ranks."""

from rank_processes import run_ranks


def train_on(count, settings, **options):
    """`train` on forked ranks; what each of them told.

    Args:
        count: number of ranks.
        settings: of the run.
        options: of `run_ranks`.
    """
    return run_ranks(count, _train, settings, **options)


def _train(settings):
    from accelerate import PartialState
    from accelerate.state import AcceleratorState, GradientState

    from comemo.train.recipe import train

    for state in (PartialState, AcceleratorState, GradientState):  # of the test's process
        state._reset_state()
    told = []
    train(settings, told.append)
    return told
