"""Ends all ranks of a run when one of them fails, and says which one, where and why.

A rank that waits in a collective for one that has failed would wait for the timeout of the group,
hours later. So each rank has two threads beside its training. One speaks with the store: it shows
signs of life, and asks whether a rank has failed. The other never waits for an answer: it ends the
process when a rank has failed, or when the store does not answer. A rank that is killed tells
nothing: the one before it, which watches its signs, does so for it.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from comemo.train import ranks
from comemo.train.rank_faults import (
    OtherRankFailed,
    Work,
    describe_error,
    describe_fault,
    is_of_connection,
    place_of_work,
    record_for_torchrun,
)
from comemo.train.rank_store import DONE, NOBODY, STORE_FAULTS, Fault, RankStore

_KNOWN, _FINISHED = "known", "finished"  # ranks that know of the fault; that ended well


@dataclass(frozen=True)
class Pace:
    """Seconds.

    Attributes:
        poll: between two questions whether a rank has failed.
        beat: between two signs of life of a rank.
        still: without a sign of life until a rank is taken for dead.
        grace: for the main thread of a rank to end by itself after another one failed.
    """

    poll: float = 1.0
    beat: float = 2.0
    still: float = 40.0
    grace: float = 4.0


PACE = Pace()


@contextmanager
def watch_ranks(tell: Callable[[str], None], pace: Pace | None = None) -> Iterator[Work]:
    """Watch the other ranks while the block trains; all ranks must enter.

    An exception in the block is told to all ranks and raised on. A rank that could not go on
    because of it raises `OtherRankFailed`; one that waits in a collective is ended hard, with
    status 1. One line names the rank that failed; `is_told` says of an exception whether it was
    told. Nothing is watched with one rank, or if the ranks did not meet at a TCPStore.

    Args:
        tell: takes that line, on the rank that failed and on the first rank of other machines.
        pace: None for `PACE`.

    Yields:
        What this rank is doing; the block keeps it up to date.

    Raises:
        OtherRankFailed: see above.
        KeyboardInterrupt: Ctrl-C on this rank, or on another one that this one waited for.
    """
    work, pace = Work(), pace or PACE
    store = RankStore.connect(pace.still) if ranks.world_size() > 1 else None
    if store is None:
        yield work
        return
    watch = _Watch(store, work, tell, pace)
    try:
        yield work
    except BaseException as error:
        watch.fail(error)
        raise
    else:
        watch.finish()
    finally:
        watch.close()


def is_told(error: BaseException) -> bool:
    """Whether the user knows of this exception already: no further line is needed."""
    return isinstance(error, OtherRankFailed) or getattr(error, "told_by_rank", False)


class _Watch:
    """The two threads of a rank; see the module."""

    def __init__(
        self, store: RankStore, work: Work, tell: Callable[[str], None], pace: Pace
    ) -> None:
        self.store, self.work, self.tell, self.pace = store, work, tell, pace
        self._fault: Fault | None = None
        self._known = threading.Event()  # a fault is
        self._ended = threading.Event()  # the block has
        self._lock = threading.Lock()
        self._told = self._acknowledged = False
        self._answers = 0  # of the store
        self._seen, self._quiet = "", 0.0  # the last sign of the next rank, and how old it is
        self._before: dict[int, str] = {}
        self._speaker = threading.Thread(target=self._speak, name="rank-signs", daemon=True)
        self._speaker.start()
        threading.Thread(target=self._judge, name="rank-watch", daemon=True).start()

    # --- the main thread ---

    def finish(self) -> None:
        """The block has ended well. The first rank may keep the store, so it ends as the last."""
        if self.store.rank:
            self.close()
        with suppress(*STORE_FAULTS):
            self.store.count(_FINISHED, 1)
        if not self.store.rank:
            self._wait_for(_FINISHED, self.pace.still)

    def fail(self, error: BaseException) -> None:
        """Publish why the block ended.

        Raises:
            OtherRankFailed, KeyboardInterrupt: another rank failed before, and this one only
                noticed that it does not answer.
        """
        lost = is_of_connection(error)
        if lost and not self._known.is_set():
            fault = self._await_reason(error)
        else:
            interrupted = isinstance(error, KeyboardInterrupt)
            fault = self._publish("" if interrupted else describe_fault(self.work, error))
        if not ranks.is_on_all(error):
            self._tell(fault)
            setattr(error, "told_by_rank", True)  # noqa: B010  (exceptions have no such attribute)
        if fault.rank == self.store.rank or not self.store.rank:
            self._wait_for(_KNOWN, self.pace.grace)
        if fault.rank != self.store.rank and lost:
            raise OtherRankFailed(fault.text) if fault.text else KeyboardInterrupt from error

    def close(self) -> None:
        """The block has ended; what other ranks do does not matter any more."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._speaker.join(2 * self.pace.poll)
        if self._known.is_set():
            self._acknowledge()
        else:
            with suppress(*STORE_FAULTS):
                self.store.show_end()

    def _await_reason(self, error: BaseException) -> Fault:
        """Why another rank does not answer: what it published, or that it shows no sign of life."""
        before, names = dict[int, str](), ""
        with suppress(*STORE_FAULTS):
            before = self.store.signs()
        if self._known.wait(3 * self.pace.beat + self.pace.poll):
            return self._taken()
        with suppress(*STORE_FAULTS):
            names = self.store.name_still(before)
        if names:
            return self._publish(self._describe_still(names, "no answer and no sign of life"))
        text = f"{self.work.describe()}: lost another rank: {describe_error(error)}"
        return self._publish(text)

    def _describe_still(self, names: str, signs: str) -> str:
        why = f"{signs}: killed, or its machine does not run"
        return f"{names}: {why}; told by {self.work.describe()}"

    def _wait_for(self, key: str, seconds: float) -> None:
        """Wait until all ranks have counted; those that are gone never do."""
        pause, step = threading.Event(), min(self.pace.poll, 0.1)
        with suppress(*STORE_FAULTS):
            while self.store.count(key) < self.store.ranks and seconds > 0:
                if key == _FINISHED and self._known.is_set():
                    return
                pause.wait(step)
                seconds -= step
        if key == _KNOWN and not self.store.rank:
            pause.wait(2 * step)  # others ask the store for the last time

    # --- the thread that speaks with the store ---

    def _speak(self) -> None:
        """Show signs of life, and look for faults, until this rank or another one ends."""
        since_sign = 0.0
        try:
            while not self._ended.wait(self.pace.poll) and not self._known.is_set():
                since_sign += self.pace.poll
                if since_sign >= self.pace.beat:
                    since_sign = 0.0
                    self.store.show_sign(place_of_work(self.work.stage, self.work.step))
                    self._look_at_next()
                if (fault := self.store.fault()) is not None:
                    self._take(fault)
                self._answers += 1
        except STORE_FAULTS as error:
            if not self._ended.is_set():
                self._store_is_gone(" ".join(str(error).split())[:200])
        if self._known.is_set():
            self._acknowledge()

    def _look_at_next(self) -> None:
        """Whether the next rank lives; if it does not, tell it, with all others that do not."""
        sign = self.store.sign((self.store.rank + 1) % self.store.ranks)
        if sign == DONE or sign != self._seen:
            self._quiet, self._before = 0.0, {}
        else:
            self._quiet += self.pace.beat
        self._seen = sign
        if self._quiet >= self.pace.still / 2 and not self._before:
            self._before = self.store.signs()
        elif self._quiet >= self.pace.still:
            names = self.store.name_still(self._before)
            signs = f"no sign of life for {self._quiet:.0f} s"
            self._publish(self._describe_still(names, signs))

    def _publish(self, text: str) -> Fault:
        """Tell all ranks, also if the store is gone; the first fault counts, and is returned."""
        fault = Fault(text, self.store.rank, self.store.host)
        if not self._known.is_set():
            with suppress(*STORE_FAULTS):
                fault = self.store.publish(fault)
        self._take(fault)
        self._acknowledge()
        return self._taken()

    def _acknowledge(self) -> None:
        """Count this rank among those that know of the fault."""
        with self._lock:
            known, self._acknowledged = self._acknowledged, True
        if not known:
            with suppress(*STORE_FAULTS):
                self.store.count(_KNOWN, 1)

    # --- the thread that ends the process ---

    def _judge(self) -> None:
        """End this process when a rank has failed, whatever its main thread waits for."""
        answers, quiet = -1, 0.0
        while not self._known.wait(self.pace.poll):
            if self._ended.is_set():
                return
            quiet = quiet + self.pace.poll if answers == self._answers else 0.0
            answers = self._answers
            if quiet >= self.pace.still:
                self._store_is_gone(f"no answer for {quiet:.0f} s")
        fault = self._taken()
        # The rank that published it waits as long for the others to know, and then ends.
        if self._ended.wait(self.pace.grace * (2 if fault.rank == self.store.rank else 1)):
            return
        self._tell(fault)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(1 if fault.text else 130)

    def _store_is_gone(self, why: str) -> None:
        text = f"{self.work.describe()}: the first rank or the launcher has ended, or cannot be"
        self._take(Fault(f"{text} reached: {why}", NOBODY, ""))

    # --- what both know ---

    def _take(self, fault: Fault) -> None:
        """The first fault that this rank knows of counts."""
        with self._lock:
            if self._fault is None:
                self._fault = fault
        self._known.set()

    def _taken(self) -> Fault:
        assert self._fault is not None
        return self._fault

    def _tell(self, fault: Fault) -> None:
        """Tell the user once for each machine, on the rank that failed if it can."""
        with self._lock:
            told, self._told = self._told, True
        if told or not fault.text:
            return
        record_for_torchrun(fault.text)
        local = os.environ.get("LOCAL_RANK", "0")
        first = local == "0" or (local == "1" and fault.rank == NOBODY)  # the first may be gone
        if fault.rank == self.store.rank or (first and fault.host != self.store.host):
            with suppress(OSError, ValueError):
                self.tell(f"comemo train: {fault.text}")
