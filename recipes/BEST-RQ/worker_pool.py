"""Work for several processes: results in order, bounded memory, no endless wait for a dead one."""

import multiprocessing
import os
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

AHEAD = 4  # jobs under way for each worker; results that nobody has taken yet stay in memory


def in_order(function, jobs, workers):
    """Results of a function for every job, in the order of the jobs.

    Arguments
    ---------
    function : callable
        Takes a job; a fresh process must be able to import it.
    jobs : iterable
        What can be sent to another process.
    workers : int
        Processes of one thread each; with 1 this process does the work.

    Yields
    ------
    object

    Raises
    ------
    OSError
        A worker was killed. (A `multiprocessing.Pool` would wait for its result for ever.)
    """
    if workers <= 1:
        yield from map(function, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _begin) as pool:
        waiting = deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(function, job))
                if len(waiting) >= AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise OSError(
                "a worker process was killed (out of memory?); try fewer --workers"
            ) from None


def _begin():
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    # A parent that is killed closes no pool: its workers would wait for jobs for ever.
    multiprocessing.parent_process().join()
    os._exit(1)
