"""Processes that stay and take one task after the other; a task that kills its process costs only itself.

`concurrent.futures` gives the whole pool up when a process dies; here the next task gets a new one.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any, NamedTuple, Self


class Finished(NamedTuple):
    """A task's end: `value` is what the function returned; `error` is None, or one line that says why there is none."""

    task: Any
    value: Any
    error: str | None


class Pool:
    """Up to `num_processes` processes that call one function; a context manager that kills them at its end.

    Args:
        function: a module's function of one argument; argument and result are pickled.
        num_processes: how many at the same time; each is started when it is first needed, with one thread for
            arithmetic, since there is one for each core.
    """

    def __init__(self, function: Callable[[Any], Any], num_processes: int) -> None:
        self.function = function
        self.num_processes = num_processes
        self._processes: dict[Connection, SpawnProcess] = {}
        self._tasks: dict[Connection, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Kill the processes; nothing that they do needs an orderly end."""
        for process in self._processes.values():
            process.kill()
        for connection, process in self._processes.items():
            process.join()
            connection.close()
        self._processes.clear()
        self._tasks.clear()

    @property
    def num_free(self) -> int:
        """How many tasks may be submitted."""
        return self.num_processes - len(self._tasks)

    @property
    def running(self) -> Sequence[Any]:
        """The tasks that are under way."""
        return list(self._tasks.values())

    def submit(self, task: Any) -> None:
        """Give a task to a free process, or to a new one.

        Raises:
            RuntimeError: all are busy.
        """
        if self.num_free < 1:
            raise RuntimeError("all processes are busy: wait for one")
        for connection in [c for c in self._processes if c not in self._tasks]:
            try:
                connection.send(task)
            except OSError:  # it has died idle
                self._remove(connection)
                continue
            self._tasks[connection] = task
            return
        connection = self._start()
        self._tasks[connection] = task
        with suppress(OSError):  # it has died at once, which `wait` will say
            connection.send(task)

    def wait(self) -> list[Finished]:
        """The tasks that have ended since the last call, at least one."""
        finished = []
        for connection in wait(list(self._tasks)):
            if not isinstance(connection, Connection):
                continue
            task = self._tasks.pop(connection)
            try:
                value, error = connection.recv()
            except (EOFError, OSError):
                value, error = None, self._remove(connection)
            finished.append(Finished(task, value, error))
        return finished

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(self.function, theirs), daemon=True)
        threads = os.environ.get("OMP_NUM_THREADS")
        # Ctrl-C goes to the whole terminal; the processes inherit that it is none of their business. The tracker is
        # started before, because starting it lifts the block.
        resource_tracker.ensure_running()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        os.environ["OMP_NUM_THREADS"] = "1"
        try:
            process.start()
        finally:
            if threads is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = threads
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()
        self._processes[ours] = process
        return ours

    def _remove(self, connection: Connection) -> str:
        """Forget a process that has died; says how."""
        process = self._processes.pop(connection)
        process.join()
        connection.close()
        code = process.exitcode or 0
        if code < 0:
            return f"the process was killed by {signal.Signals(-code).name}"
        return f"the process ended with status {code}"


def _serve(function: Callable[[Any], Any], connection: Connection) -> None:
    """A process's life: a task, its answer, the next."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        answer: tuple[Any, str | None]
        try:
            answer = (function(task), None)
        except Exception as error:
            answer = (None, one_line(error))
        connection.send(answer)


def _end_with_parent() -> None:
    """A parent that is killed cannot stop its processes: they look after that themselves."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def one_line(error: BaseException) -> str:
    """Kind and text of an error, without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split())
