"""`python -m eval` from the root of a checkout: the same as `delo-eval`."""

import sys

from delo_eval.cli import main

sys.exit(main())
