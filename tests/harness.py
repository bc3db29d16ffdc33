"""Run a function on several ranks: their own processes, gloo, and none left over whatever happens."""

import importlib.util
import inspect
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait

_COLLECTIVE_TIMEOUT = timedelta(seconds=30)
_PRELOADED = ["pytest", "torch.distributed", "pisa_dist.runner", "pisa_dist.optim"]
_GRACE_SECONDS = 2.0  # for the other ranks to say why, too, once one has failed


def run_ranks(function, num_ranks, *args, timeout=240):
    """Call `function(rank, num_ranks, *args)` on every rank and return the list of results.

    Ranks are forked from a process that has imported the package, which takes seconds, and done nothing else. They see
    the environment variables of the moment when the first rank of all was started.

    Args:
        function: module-level function of a test module; arguments and result can be pickled (tensors too).
        num_ranks: number of processes, each in one gloo process group.
        timeout: seconds for everything, start included.

    Raises:
        Exception: of the rank that failed first, with the traceback that it had there as a note.
        TimeoutError: after `timeout` seconds, naming the ranks that were still running; all are killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    deadline = time.monotonic() + timeout
    pickled_args = pickle.dumps(args)  # not left to multiprocessing, which would share tensors' memory
    processes, pending, results, failures = [], {}, {}, []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(num_ranks):
                receiver, sender = context.Pipe(duplex=False)
                target = (inspect.getsourcefile(function), function.__qualname__)
                process = context.Process(
                    target=_rank_main,
                    args=(target, rank, num_ranks, pickled_args, os.path.join(folder, "store"), sender),
                    daemon=True,
                )
                process.start()
                sender.close()
                processes.append(process)
                pending[receiver] = rank
            while pending and time.monotonic() < deadline:
                for receiver in wait(list(pending), timeout=max(0.0, deadline - time.monotonic())):
                    rank = pending.pop(receiver)
                    succeeded, value = _receive(receiver, rank)
                    if succeeded:
                        results[rank] = value
                    else:
                        failures.append(value)
                        deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
            if failures:
                raise failures[0]
            if pending:
                raise TimeoutError(f"ranks {sorted(pending.values())} still running after {timeout} s")
            for process in processes:
                process.join(max(1.0, deadline - time.monotonic()))
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
    return [results[rank] for rank in range(num_ranks)]


def run_cases(every_case, num_ranks):
    """`run_ranks` of a function that returns outcomes by the name of a case: case -> its outcome on each rank."""
    by_rank = run_ranks(every_case, num_ranks)
    return lambda case: [outcomes[case.__name__] for outcomes in by_rank]


def _receive(receiver, rank):
    try:
        return pickle.loads(receiver.recv_bytes())
    except EOFError:
        return False, RuntimeError(f"rank {rank} died without a word")


def _rank_main(target, rank, num_ranks, pickled_args, store_path, sender):
    import torch
    import torch.distributed as dist

    try:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store_path, num_ranks),
            rank=rank,
            world_size=num_ranks,
            timeout=_COLLECTIVE_TIMEOUT,
        )
        result = _load(*target)(rank, num_ranks, *pickle.loads(pickled_args))
        message = pickle.dumps((True, result))
    except BaseException as error:
        message = pickle.dumps((False, _picklable(error, rank)))
    sender.send_bytes(message)
    sender.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def _load(path, name):
    """Function `name` of the file: pytest's module names mean nothing in a fresh process."""
    folder = os.path.dirname(path)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    module_name = os.path.splitext(os.path.basename(path))[0]
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        sys.modules[module_name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module_name])
    return getattr(sys.modules[module_name], name)


def _picklable(error, rank):
    note = f"on rank {rank}:\n{''.join(traceback.format_exception(error))}"
    error.add_note(note)
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(note)
    return error
