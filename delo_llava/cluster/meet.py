"""`python -m delo_llava.cluster.meet`: one of two processes that form a group and add up their numbers."""

import sys
from datetime import timedelta

import torch
from torch import distributed

if __name__ == "__main__":
    distributed.init_process_group("gloo", timeout=timedelta(seconds=float(sys.argv[1])))
    total = torch.tensor([distributed.get_rank() + 1])
    distributed.all_reduce(total)
    distributed.destroy_process_group()
    sys.exit(0 if int(total) == 3 else 1)
