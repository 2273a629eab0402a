"""Processes of a loop: a child whose evaluations can be killed, and workers on one storage.

All of them end with the process that started them, even if it is killed.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from optuna.storages import BaseStorage

from surrogates.sampler import stamp

WATCH = 0.5  # seconds between looks at the parent
IMPORTABLE = "Expected an objective that another process can import, a function of a module"


class EvaluationError(RuntimeError):
    """What went wrong with an evaluation, which is stepped over."""


class Child:
    """A process that evaluates a function; it is killed, with all it started, after a timeout.

    A context, which ends the process; the next call starts another where one was killed.

    Args:
        f: of one argument; what it returns can be pickled, what it raises is an EvaluationError.
        timeout: seconds.

    Raises:
        ValueError: when entered, if another process cannot have the function.
    """

    def __init__(self, f: Callable[[Any], Any], timeout: float) -> None:
        self.f, self.timeout = f, timeout
        self.process: Any = None
        self.pipe: Connection | None = None

    def __enter__(self) -> Child:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __call__(self, argument: Any) -> Any:
        """f(argument).

        Raises:
            EvaluationError: the timeout, what the function raised, or that its process died.
        """
        if self.process is None:
            self._start()
        assert self.pipe is not None
        in_time, is_answer, answer = True, False, None
        try:
            self.pipe.send(argument)
            in_time = self.pipe.poll(self.timeout)
            if in_time:
                is_answer, answer = self.pipe.recv()
        except (EOFError, OSError) as error:
            code = self.stop()
            raise EvaluationError(f"The evaluation's process ended with code {code}.") from error
        except BaseException:
            self.stop()
            raise
        if not in_time:
            self.stop()
            raise EvaluationError(f"TimeoutError: the evaluation took more than {self.timeout:g} s")
        if not is_answer:
            raise EvaluationError(answer)
        return answer

    def stop(self) -> int | None:
        """Kills the process, and all it started; its exit code."""
        if self.process is None:
            return None
        assert self.pipe is not None
        if os.name == "posix":
            # before `join`, after which the id could be another's; no such group: not begun yet
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.pipe.close()
        code: int = self.process.exitcode
        self.process = self.pipe = None
        return code

    def _start(self) -> None:
        context = _context()
        pipe, other = context.Pipe()
        process = context.Process(target=_serve, args=(self.f, other, pipe, os.getpid()))
        start(process)
        self.process, self.pipe = process, pipe
        other.close()
        try:
            pipe.recv()  # that it is ready: new interpreters take seconds to begin
        except BaseException as error:
            self.stop()
            if isinstance(error, EOFError):
                raise ValueError(f"{IMPORTABLE}; its process could not start.") from error
            raise


class Workers:
    """Processes that run one function, as a context that kills those left at its end.

    Args:
        work: takes an event, which it sets if the others shall stop too.
        count: processes.
    """

    def __init__(self, work: Callable[[Any], None], count: int) -> None:
        context = _context()
        self.event, self.began = context.Event(), context.Event()
        self.failures = context.SimpleQueue()
        arguments = (work, self.event, self.began, self.failures, os.getpid())
        self.processes = [context.Process(target=_work, args=arguments) for _ in range(count)]

    @staticmethod
    def reopen(
        storage: str | BaseStorage, open_storage: Callable[[str | BaseStorage], BaseStorage]
    ) -> BaseStorage:
        """A storage of this process, with connections of its own."""
        copy = storage if isinstance(storage, str) else pickle.loads(pickle.dumps(storage))
        return open_storage(copy)

    def __enter__(self) -> Workers:
        for process in self.processes:
            start(process)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join()

    @property
    def stopped(self) -> bool:
        """Whether a worker was told to stop."""
        return bool(self.event.is_set())

    @property
    def died(self) -> bool:
        """Whether a worker ended before its work did."""
        return any(process.exitcode != 0 for process in self.processes)

    def are_alive(self, seconds: float) -> bool:
        """Whether one is, after a wait."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return any(process.is_alive() for process in self.processes)

    def raise_failure(self) -> None:
        """Raises what ended a worker, or kept all from starting, if something did."""
        if not self.failures.empty():
            raise RuntimeError(f"A worker failed.\n{self.failures.get()}")
        if not self.began.is_set():
            raise ValueError(f"{IMPORTABLE}; no worker could start.")


def is_dead(owner: str) -> bool:
    """Whether the process of a `stamp` was on this machine and is no more."""
    host, pid, _ = owner.rsplit(":", 2)
    if host != stamp().rsplit(":", 2)[0] or os.name != "posix":
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return stamp(int(pid)) != owner or _is_zombie(int(pid))


def describe(error: BaseException) -> str:
    """An exception in a line, with the place that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({last.filename}, line {last.lineno})"


def start(process: Any) -> None:
    """Starts a process; forks of threads are meant, see `_context`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork")
        try:
            process.start()
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(f"{IMPORTABLE}: {error}") from error


def _context() -> Any:
    """Forks on Linux, where closures and notebooks work so; new interpreters elsewhere."""
    return multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


def _serve(f: Callable[[Any], Any], pipe: Connection, other: Connection, parent: int) -> None:
    """Says that it is ready, then answers evaluations until the parent goes."""
    other.close()
    _settle(parent, own_group=True)
    pipe.send(None)
    while True:
        try:
            argument = pipe.recv()
        except EOFError:
            return
        try:
            message = (True, f(argument))
        except EvaluationError as error:
            message = (False, str(error))
        pipe.send(message)


def _work(work: Callable[[Any], None], event: Any, began: Any, failures: Any, parent: int) -> None:
    _settle(parent, own_group=False)
    began.set()
    try:
        work(event)
    except BaseException:
        failures.put(traceback.format_exc())
        sys.exit(1)


def _settle(parent: int, own_group: bool) -> None:
    """Leaves Ctrl-C to the parent, goes when it goes, and has one thread, as forks must."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if own_group and os.name == "posix":
        os.setsid()
    torch.set_num_threads(1)
    threading.Thread(target=_watch, args=(parent, own_group), daemon=True).start()


def _watch(parent: int, own_group: bool) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH)
    if own_group and os.name == "posix":
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _is_zombie(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state == "Z"
