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
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from optuna.storages import BaseStorage

from surrogates.sampler import stamp

WATCH = 0.5  # seconds between looks at the parent


class EvaluationError(RuntimeError):
    """What another process says went wrong."""


class Child:
    """A process that evaluates a function; it is killed, with all it started, after a timeout.

    Args:
        f: of one argument.
        timeout: seconds.
    """

    def __init__(self, f: Callable[[Any], Any], timeout: float) -> None:
        self.f, self.timeout = f, timeout
        self.process: Any = None
        self.pipe: Connection | None = None

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
            self.process.join()
            code = self.process.exitcode
            self.stop()
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

    def stop(self) -> None:
        """Kills the process."""
        if self.process is None:
            return
        _kill(self.process)
        assert self.pipe is not None
        self.pipe.close()
        self.process = self.pipe = None

    def _start(self) -> None:
        context = _context()
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(self.f, other, self.pipe, os.getpid()))
        start(self.process)
        other.close()


class Workers:
    """Processes that run one function, as a context that kills those left at its end.

    Args:
        work: takes an event, which it sets if the others shall stop too.
        count: processes.
    """

    def __init__(self, work: Callable[[Any], None], count: int) -> None:
        context = _context()
        self.event = context.Event()
        self.failures = context.SimpleQueue()
        arguments = (work, self.event, self.failures, os.getpid())
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
            _kill(process)

    @property
    def stopped(self) -> bool:
        """Whether a worker was told to stop."""
        return bool(self.event.is_set())

    @property
    def died(self) -> bool:
        """Whether the system ended a worker."""
        return any(process.exitcode not in (0, 1) for process in self.processes)

    def are_alive(self, seconds: float) -> bool:
        """Whether one is, after a wait."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return any(process.is_alive() for process in self.processes)

    def raise_failure(self) -> None:
        """Raises what ended a worker, if something did."""
        if not self.failures.empty():
            raise RuntimeError(f"A worker failed.\n{self.failures.get()}")


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
            raise ValueError(
                "Expected an objective that another process can import, a function of a module: "
                f"{error}"
            ) from error


def _context() -> Any:
    """Forks on Linux, where closures and notebooks work so; new interpreters elsewhere."""
    return multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


def _serve(f: Callable[[Any], Any], pipe: Connection, other: Connection, parent: int) -> None:
    """Answers evaluations until the parent goes."""
    other.close()
    _settle(parent, own_group=True)
    while True:
        try:
            argument = pipe.recv()
        except EOFError:
            return
        try:
            message = (True, f(argument))
        except Exception as error:
            message = (False, describe(error))
        try:
            pipe.send(message)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            pipe.send((False, f"Expected an answer that can be sent to the loop: {error}"))


def _work(work: Callable[[Any], None], event: Any, failures: Any, parent: int) -> None:
    _settle(parent, own_group=False)
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


def _kill(process: Any) -> None:
    if process.pid is None:
        return
    try:
        if os.name == "posix" and os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.kill()
    process.join()


def _is_zombie(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state == "Z"
