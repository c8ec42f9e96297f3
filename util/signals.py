"""Requests to stop: SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C end a program between two steps, with one exit code.

A signal belongs to the process, and so does what this module remembers. Outside of `deferred` a request ends the
program at once, by the exception `Stopped`; inside, it waits until the program asks.
"""

import contextlib
import multiprocessing
import multiprocessing.util
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence

EXIT_STOPPED = 85  # stopped as requested, to be continued with --resume auto
EXIT_INTERRUPTED = 130  # a second Ctrl-C: what shells report of a program that Ctrl-C ended
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
SAME_PRESS = 0.1  # seconds; launchers pass on a Ctrl-C that the terminal has sent already


class Stopped(BaseException):
    """A request to stop, honoured. Not an Exception: nothing that mends errors may swallow it.

    told: what was saved and how to go on, where there is something to say.
    """

    def __init__(self, number: int, told: str = "nothing to save"):
        super().__init__(number, told)
        self.number, self.told = number, told

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}: {self.told}"


class DeadWorker(RuntimeError):
    """A worker process, of a loader or of an evaluation, has ended without being asked to."""


_requested = 0  # number of the first signal
_last_interrupt = float("-inf")
_deferred = False
_thrown = False  # Stopped was raised where a signal found the program, and has not been seen since
_listener: int | None = None  # process that listens; its children have other business


def requested() -> int:
    """Number of the signal that asked the program to stop; 0 where none did."""
    return _requested


def check() -> None:
    """Raise Stopped where that was asked for."""
    if _requested:
        raise Stopped(_requested)


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Take the signals for requests to stop, until the block ends."""
    global _requested, _deferred, _thrown, _listener, _last_interrupt
    _requested, _deferred, _thrown, _listener, _last_interrupt = 0, False, False, os.getpid(), float("-inf")
    before = {number: signal.signal(number, _receive) for number in SIGNALS}
    try:
        with _found_again():
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _requested, _listener = 0, None


def _receive(number: int, frame: object) -> None:
    global _requested, _thrown, _last_interrupt
    if os.getpid() != _listener:  # a child: to it, the signal is what it is to any program; Pool.terminate relies on it
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    if number == signal.SIGINT:
        now = time.monotonic()
        if _last_interrupt > float("-inf") and now - _last_interrupt > SAME_PRESS:
            quit_at_once(EXIT_INTERRUPTED)
        _last_interrupt = now
    _requested = _requested or number
    if not _deferred:
        _thrown = True
        check()


@contextlib.contextmanager
def _found_again() -> Iterator[None]:
    """Compiled code that a signal interrupts may take Stopped for an error of its own, and raise that instead."""
    global _thrown
    try:
        yield
    except Stopped:
        _thrown = False
        raise
    except Exception:
        if not _thrown:
            raise
        _thrown = False
        check()


@contextlib.contextmanager
def deferred(defer: bool = True) -> Iterator[None]:
    """Signals wait for `check` in the block; with defer = False, they end a part of such a block at once again."""
    global _deferred
    before, _deferred = _deferred, defer
    try:
        if defer:
            yield
        else:
            check()
            with _found_again():
                yield
    finally:
        _deferred = before


@contextlib.contextmanager
def saving(save: Callable[[], str]) -> Iterator[None]:
    """Requests to stop wait in the block until the program asks; the one that ends it has `save` keep the work first,
    and say so."""
    with deferred():
        try:
            yield
        except Stopped as stop:
            stop.told = save()
            raise


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Processes and threads that the block starts never see the signals; this one sees them when the block ends.

    For the workers of a loader: Ctrl-C and batch systems signal whole groups of processes.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def kill_at_exit(workers: Sequence[multiprocessing.Process]) -> None:
    """Have processes that were started `blocked` killed when the program ends, where they still run.

    Python would send them SIGTERM, which they do not see, and wait for them for ever.
    """
    multiprocessing.util.Finalize(None, _kill, args=(tuple(workers),), exitpriority=100)


def _kill(processes: Sequence[multiprocessing.Process]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch raises an error where a worker is killed
    for process in processes:
        process.kill()


def kill_children() -> None:
    """End loader workers that may be busy for long, and do not listen: nothing waits for them any more."""
    _kill(multiprocessing.active_children())


def quit_at_once(code: int) -> None:
    """Leave without any clearing up; files are whole or absent all the same."""
    kill_children()
    os._exit(code)
