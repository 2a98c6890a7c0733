"""One line of progress: a bar at a terminal, else a line of text for each log entry."""

import sys
from collections.abc import Callable
from datetime import timedelta

from tqdm import tqdm


class Progress:
    """Shows how far a stage is.

    Args:
        stage: its name.
        total: its steps.
        done: steps before a resumed run.
        tell: prints a line, used where stderr is not a terminal.
    """

    def __init__(self, stage: str, total: int, done: int, tell: Callable[[str], None]) -> None:
        self.stage, self.total, self.tell = stage, total, tell
        self.bar: tqdm | None = None
        if sys.stderr.isatty():
            self.bar = tqdm(
                desc=stage,
                total=total,
                initial=done,
                unit="step",
                dynamic_ncols=True,
                smoothing=0.1,
                file=sys.stderr,
            )

    def advance(self, step: int) -> None:
        """A step is done."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def show(self, step: int, scalars: dict[str, float]) -> None:
        """Show the numbers of a log entry."""
        text = describe(scalars)
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        else:
            left = timedelta(seconds=round(scalars["seconds_per_step"] * (self.total - step)))
            self.tell(f"{self.stage} {step:,}/{self.total:,}  {text}  {left} left")

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def beside_bar(tell: Callable[[str], None]) -> Callable[[str], None]:
    """The same function, for lines that do not run into a bar."""

    def told(text: str) -> None:
        with tqdm.external_write_mode(file=sys.stderr):
            tell(text)

    return told


def describe(scalars: dict[str, float]) -> str:
    """A log entry in one line."""
    return (
        f"loss {scalars['loss']:.4f}  lr {scalars['learning_rate']:.3g}"
        f"  {scalars['tokens_per_second']:,.0f} tokens/s"
        f"  {scalars['tiles_per_second']:.1f} tiles/s"
        f"  padding {scalars['padding_share']:.1%}"
        f"  data {scalars['data_wait_share']:.0%}"
    )
