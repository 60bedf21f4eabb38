"""What the commands of this folder share: how they end."""

import sys
from collections.abc import Callable

from delo_llava.endings import told


def run(main: Callable[[], None]) -> None:
    """Run a command and leave with its exit code; started again, it goes on where it was."""
    sys.exit(told(lambda: main() or 0, goes_on=True))
