"""What the commands of this folder share: how they end."""

import sys
from collections.abc import Callable

from delo_llava.endings import told


def run(main: Callable[[], None]) -> None:
    """Run a command and leave with its exit code; started again, it goes on where it was."""

    def command() -> int:
        main()
        return 0

    sys.exit(told(command, goes_on=True))
