"""How a job ends: in good order; or, when something is wrong, with one message for the user."""

import gc
import os
import sys
from collections.abc import Callable, Sequence

import torch
from speechbrain.utils.distributed import is_distributed_initialized


def run(main: Callable[[Sequence[str]], object]) -> None:
    """Call ``main`` with the command line; say what is wrong in a message and exit with 1.

    Arguments
    ---------
    main : Callable
        Takes what follows the script's name. Wrong input raises OSError, ValueError or KeyError
        with a message for the user; anything else is a bug of ours and keeps its traceback. So do
        these with ``HFF_TRACEBACK=1`` in the environment.
    """
    try:
        main(sys.argv[1:])
    except SystemExit as done:  # --fill_only, say
        if done.code:
            raise
    except (OSError, ValueError, KeyError) as error:
        if os.environ.get("HFF_TRACEBACK"):
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"\nerror: {message}\n(HFF_TRACEBACK=1 shows where)", file=sys.stderr)
        sys.exit(1)
    if is_distributed_initialized():
        # Left to the interpreter's end, gloo's threads abort every other job that is done, see
        # https://github.com/pytorch/pytorch/pull/179291; modules in cycles keep the group alive.
        gc.collect()
        torch.distributed.destroy_process_group()
