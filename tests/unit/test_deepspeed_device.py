"""DeepSpeed keeps the device that a process used first; asking for another is said, not found out later."""

import subprocess
import sys

ASK = """
import torch
from delo_llava.engines.group import import_deepspeed
from delo_llava.errors import DeloError
import_deepspeed(torch.device("cpu"))
import_deepspeed(torch.device("cpu"))
try:
    import_deepspeed(torch.device("cuda"))
except DeloError as error:
    print(error)
"""


def test_a_second_kind_of_device_is_refused() -> None:
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
    assert "given:   cuda, after cpu" in done.stdout
