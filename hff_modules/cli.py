"""How a job ends when something is wrong: one message, not a traceback from deep inside."""

import os
import sys
from collections.abc import Callable, Sequence


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
    except (OSError, ValueError, KeyError) as error:
        if os.environ.get("HFF_TRACEBACK"):
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"\nerror: {message}\n(HFF_TRACEBACK=1 shows where)", file=sys.stderr)
        sys.exit(1)
