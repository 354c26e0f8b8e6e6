"""Signals and closed streams during training: a run ends within seconds, and saves a checkpoint.

The handler ends `interruptible` work, and adds the signal to SIGNALS. Training reads SIGNALS before each
micro-batch, and ends without the unfinished step. The third Ctrl-C ends the run at once.
"""

import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

SIGNALS: list[int] = []  # signals that this process has received since stop_between_steps began
LOADERS: list = []       # the processes that load data


class AtOnce(KeyboardInterrupt):
    """The third Ctrl-C ends the run at once. Unfinished steps and half-written files are lost."""


class Stop:
    """stop() is True after Ctrl-C, SIGTERM or SIGHUP (the terminal was closed)."""

    waiting = False

    def __call__(self) -> bool:
        return bool(SIGNALS)

    def press(self, number: int, _frame) -> None:
        """Handle a signal: record it, and interrupt `interruptible` work. The third Ctrl-C raises AtOnce."""
        SIGNALS.append(number)
        if SIGNALS.count(signal.SIGINT) > 2:  # torchrun forwards each Ctrl-C, so it counts twice
            raise AtOnce
        if self.waiting:
            raise KeyboardInterrupt

    def interruptible(self, work: Callable, *given):
        """work(*given), or None if a signal came before its end. For long work without side effects."""
        try:
            try:
                self.waiting = True
                return None if SIGNALS else work(*given)
            finally:
                self.waiting = False
        except AtOnce:
            raise
        except KeyboardInterrupt:
            return None


@contextmanager
def stop_between_steps() -> Iterator[Stop]:
    """Yield a Stop. Within the block, signals do not end the process, except the third Ctrl-C."""
    stop, numbers = Stop(), [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
        numbers.append(signal.SIGHUP)
    SIGNALS.clear()
    previous = {number: signal.signal(number, stop.press) for number in numbers}
    try:
        yield stop
    finally:  # keep SIGNALS, so that Lasting does not wait for a full pipe at the end either
        for number, handler in previous.items():
            signal.signal(number, handler)


def leave_signals_to_the_parent(_worker: int) -> None:
    """Ignore signals in a process that loads data: its parent ends it, see `ending_loaders`."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = lambda *_: None  # no traceback of multiprocessing when the parent has ended


@contextmanager
def ending_loaders(batches: Iterator) -> Iterator[None]:
    """End the processes of a DataLoader's iterator at the end of the block: they ignore signals."""
    LOADERS[:] = getattr(batches, "_workers", [])
    try:
        yield
    finally:
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises for a killed loader
        end_loaders()
        signal.signal(signal.SIGCHLD, handler)


def end_loaders() -> None:
    """Kill the processes of `ending_loaders`."""
    for process in LOADERS:
        process.kill()
        process.join(1)


class Lasting:
    """A text stream that drops its text if the pipe is closed. After a signal, it also drops the text if the
    pipe is full; before, it waits."""

    def __init__(self, stream):
        self.stream, self.text = stream, ""

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        """Write whole lines at once, so that the lines of several ranks stay apart."""
        self.text += text
        if text.endswith("\n"):
            self.flush()

    def flush(self) -> None:
        """Write all text so far, even if its last line has no end."""
        text, self.text = self.text, ""
        try:
            while not select.select([], [self.stream], [], 0.2)[1]:
                if SIGNALS:
                    raise BrokenPipeError
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())  # drops the text in the buffer too


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Wrap standard output and error in Lasting. A stream without a file descriptor stays unchanged."""
    before = sys.stdout, sys.stderr
    for name, stream in zip(("stdout", "stderr"), before):
        with suppress(AttributeError, ValueError):  # no file descriptor, as in tests
            if stream is None:  # it was closed when the process began
                stream = open(os.devnull, "w")  # noqa: SIM115
            stream.fileno()
            setattr(sys, name, Lasting(stream))
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before
