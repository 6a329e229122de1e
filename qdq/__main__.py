"""`qdq` and `python -m qdq`."""

import sys

from qdq.cli.console import comes_from_interrupt, report_interrupt


def main() -> None:
    """Entry point of `qdq`: loads and runs the command line, and reports Ctrl-C while it is loading."""
    try:
        from qdq.cli.main import main as run_command_line

        run_command_line()
    except BaseException as error:
        if isinstance(error, SystemExit) or not comes_from_interrupt(error):
            raise
        sys.exit(report_interrupt())


if __name__ == "__main__":
    main()
