"""What the commands of this folder share: how they end."""

from collections.abc import Callable

from delo_llava.errors import DeloError, report_and_exit


def run(main: Callable[[], None]) -> None:
    """Run a command; what a user can put right is told without a traceback."""
    try:
        main()
    except DeloError as error:
        report_and_exit(error)
