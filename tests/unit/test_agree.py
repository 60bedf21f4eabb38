"""What ranks that do not run the same thing are told."""

from typing import Any

import pytest
import torch

from delo_llava.engines.agree import require_agreement
from delo_llava.engines.ranks import Ranks
from delo_llava.errors import DeloError


class Two(Ranks):
    """This rank, and another one with the same facts but for some."""

    other: dict[str, Any]

    def each(self, value: Any) -> list[Any]:
        if isinstance(value, dict):
            return [value, value | self.other]
        return [value, None if value is None else f"not {value}" if self.other else value]


def refused(**other: str) -> DeloError:
    ranks = Two(0, 2, torch.device("cpu"))
    object.__setattr__(ranks, "other", {key.replace("_", " "): value for key, value in other.items()})
    facts = {"config output": "runs/a", "config seed": 1, "source": "abc"}
    with pytest.raises(DeloError, match="do not run the same thing") as error:
        require_agreement(ranks, lambda: facts)
    return error.value


def test_other_code_on_a_node_is_named() -> None:
    error = refused(source="xyz")
    assert "source: abc on rank 0, xyz on rank 1" in error.message
    assert error.everywhere and error.fix is not None and "one version" in error.fix


def test_two_jobs_that_met_on_one_port_are_told_so() -> None:
    """A rank of one reached the store of the other: both name another folder."""
    error = refused(config_output="runs/b", config_seed="2")
    assert "config output: runs/a on rank 0, runs/b on rank 1" in error.message
    assert error.fix is not None and "--master_port" in error.fix
