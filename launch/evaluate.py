"""Evaluate saved stages of a run, on one process or several.

python launch/evaluate.py --run runs/x --stage all
deepspeed --num_gpus 2 launch/evaluate.py --run runs/x --stage 3
"""

import sys

from delo_eval.cli import main

if __name__ == "__main__":
    sys.exit(main())
