"""Requests to stop: SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C end a program between two steps, with one exit code.

A signal belongs to the process, and so does what this module remembers. Outside of `deferred` a request ends the
program at once, by the exception `Stopped`; inside, it waits until the program asks.
"""

import contextlib
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence

EXIT_STOPPED = 85  # not finished, to be continued with --resume auto
EXIT_INTERRUPTED = 130  # a second Ctrl-C: what shells report of a program that Ctrl-C ended
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
SAME_PRESS = 0.1  # seconds; launchers pass on a Ctrl-C that the terminal has sent already


class Stopped(BaseException):
    """A request to stop, honoured. Not an Exception, so that no error handling swallows it.

    outcome: what was saved and how to continue, once that is known. reported_here: False where another process reports
    the same.
    """

    def __init__(self, number: int, outcome: str = ""):
        super().__init__(number, outcome)
        self.number, self.outcome, self.reported_here = number, outcome, True

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}: {self.outcome or 'nothing to save'}"


class State:
    """What the process that listens remembers."""

    requested = 0  # number of the first signal
    interrupted: float | None = None  # when Ctrl-C came last
    deferred = False
    saving = False  # the work, after a request to stop
    thrown = False  # Stopped was raised where a signal arrived, and has not been caught since

    def __init__(self, listener: int | None = None):
        self.listener = listener  # process id; its children treat signals as any program does


_state = State()


def requested() -> int:
    """Number of the signal that asked the program to stop; 0 where none did."""
    return _state.requested


def saving_now() -> bool:
    """Whether a request to stop is being honoured, by saving."""
    return _state.saving


def check() -> None:
    """Raise Stopped where that was asked for."""
    if _state.requested:
        raise Stopped(_state.requested)


def exit_on_request() -> None:
    """Until `listening`, while modules are imported, a request to stop ends the process with EXIT_STOPPED."""

    def leave(number: int, frame: object) -> None:
        os.write(2, f"{os.path.basename(sys.argv[0])}: {Stopped(number)}\n".encode())
        os._exit(EXIT_STOPPED)

    for number in SIGNALS:
        signal.signal(number, leave)


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Take the signals for requests to stop, until the block ends."""
    global _state
    _state = State(os.getpid())
    before = {number: signal.signal(number, _receive) for number in SIGNALS}
    try:
        with _restored():
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _state = State()


def _receive(number: int, frame: object) -> None:
    if os.getpid() != _state.listener:  # in a child: the default action; Pool.terminate relies on it
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    if number == signal.SIGINT:
        before, _state.interrupted = _state.interrupted, time.monotonic()
        if before is not None and _state.interrupted - before > SAME_PRESS:
            quit_at_once(EXIT_INTERRUPTED)
    _state.requested = _state.requested or number
    if not _state.deferred:
        _state.thrown = True
        check()


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    """Compiled code that a signal interrupts may turn Stopped into an error of its own: raise Stopped again."""
    try:
        yield
    except (Stopped, Exception) as error:
        thrown, _state.thrown = _state.thrown, False
        if thrown and not isinstance(error, Stopped):
            check()
        raise


@contextlib.contextmanager
def deferred(defer: bool = True) -> Iterator[None]:
    """Signals wait for `check` in the block; with defer = False, they end a part of such a block at once again."""
    before, _state.deferred = _state.deferred, defer
    try:
        if defer:
            yield
        else:
            check()
            with _restored():
                yield
    finally:
        _state.deferred = before


@contextlib.contextmanager
def saving(save: Callable[[], str], reported_here: bool = True) -> Iterator[None]:
    """Requests to stop wait in the block until the program asks; then `save` keeps the work, and says what it kept.

    reported_here: False for processes that stop with another one, which reports it."""
    with deferred():
        try:
            yield
        except Stopped as stop:
            if not stop.outcome:
                _state.saving = True
                stop.outcome, stop.reported_here = save(), reported_here
            raise


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Processes and threads that the block starts never see the signals; this process sees them when the block ends.

    For the workers of a loader: Ctrl-C and batch systems signal whole groups of processes.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def kill_at_exit(workers: Sequence[multiprocessing.Process]) -> None:
    """Kill processes that were started `blocked` and still run when the program ends.

    Python would send them SIGTERM, which they do not see, and wait for them without end.
    """
    multiprocessing.util.Finalize(None, _kill, args=(tuple(workers),), exitpriority=100)


def _kill(processes: Sequence[multiprocessing.Process]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch raises an error where a worker is killed
    for process in processes:
        process.kill()


def quit_at_once(code: int) -> None:
    """Leave without any clean-up but for workers; files are whole or absent all the same."""
    kill_children()
    os._exit(code)


def kill_children() -> None:
    """Kill loader workers, which may be busy for long and do not listen: their work is no longer needed."""
    _kill(multiprocessing.active_children())
