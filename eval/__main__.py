"""`python -m eval` from the root of a checkout: the same as `delo-eval`."""

from delo_eval.run import main

main()
