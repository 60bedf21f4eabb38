"""Train a task sequence and evaluate after each task.

    deepspeed --num_gpus 2 launch/train.py --task_seq mini6 --output runs/x   # two ranks, GPUs or CPU
    python launch/train.py --zero none                                        # one process, without DeepSpeed

`deepspeed` without --num_gpus starts one rank per GPU, and a single one on a machine without GPUs.
"""

import sys

from delo_llava.engines import signals

signals.install()  # before the slow imports, so that a signal during them is not lost

from delo_llava.cli import main_train  # noqa: E402

if __name__ == "__main__":
    sys.exit(main_train(sys.argv[1:]))
