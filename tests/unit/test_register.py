"""Importing the package is cheap; `register` makes PEFT open our adapters."""

import subprocess
import sys

import pytest

KNOWN = "import peft.mapping; assert 'DELO' in peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING"


@pytest.mark.parametrize(
    "order",
    [
        "import delo_llava, peft; delo_llava.register()",
        pytest.param(
            "import peft, delo_llava; delo_llava.register(); delo_llava.register()", marks=pytest.mark.long
        ),
        "import delo_llava.methods.delo",
    ],
)
def test_the_tuner_is_registered(order: str) -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", f"{order}; {KNOWN}"], check=True)


def test_the_package_itself_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'peft', 'transformers', 'pydantic'}"
    code = f"import delo_llava, sys; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
