"""The command line: `python -m ftcore [verb] [group=option ...] [key=value ...]`.

Compose and check first; torch is imported only once nothing is wrong with the config.
"""

import sys

from ftcore.cli.command import run_command
from ftcore.console import stderr
from ftcore.errors import traced


def main() -> None:
    """Entry point: run the command line, exit with the status of DESIGN's table."""
    try:
        sys.exit(run_command(sys.argv[1:]))
    except Exception as error:  # a fault of ours; its message may hold anything
        stderr.print(traced(error), end="")
        sys.exit(1)


if __name__ == "__main__":
    main()
