"""`python -m delo_llava` is `delo-llava`."""

import sys

from delo_llava.cli import main

if __name__ == "__main__":
    sys.exit(main())
