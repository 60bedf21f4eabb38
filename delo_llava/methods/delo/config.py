"""Configuration of a DeLo adapter, and its size in closed form."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from delo_llava.adapters.tuner import LinearsConfig
from delo_llava.errors import DeloError

PEFT_TYPE = "DELO"


@dataclass
class DeloConfig(LinearsConfig):
    """One task's experts. Everything but the weights must agree between the adapters of one model. The
    projector's linears have image pools only.

    Attributes:
        r: factors chosen per modality and linear, the rank of each update.
        pool_size: E, factors in each pool.
        alpha: the update is scaled by alpha / r.
        scope: `own` updates image tokens from the image pools and the others from the text pools; `all` adds
            both everywhere.
        gate: `ste`, `none` or `softmax`; temperature: of its softmax.
        conditional: `table`, `none` or `factor`: how the choice of B depends on that of A.
        latent: width of the router's down-projection, and rank of the learned cross-modal map.
        cross_modal: `identity`, `linear` or `ridge`.
    """

    r: int = 4
    pool_size: int = 16
    alpha: float = 8.0
    scope: Literal["own", "all"] = "own"
    gate: Literal["ste", "none", "softmax"] = "ste"
    temperature: float = 1.0
    conditional: Literal["table", "none", "factor"] = "table"
    latent: int = 64
    cross_modal: Literal["identity", "linear", "ridge"] = "identity"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if not 1 <= self.r <= self.pool_size:
            raise DeloError(
                "The rank must lie between 1 and the pool size",
                given=self.r,
                fix=f"choose r <= {self.pool_size}",
            )
        choices = {
            "scope": ("own", "all"),
            "gate": ("ste", "none", "softmax"),
            "conditional": ("table", "none", "factor"),
        }
        for name, allowed in (choices | {"cross_modal": ("identity", "linear", "ridge")}).items():
            if getattr(self, name) not in allowed:
                raise DeloError(f"Unknown {name}", given=getattr(self, name), allowed=allowed)

    @property
    def scale(self) -> float:
        """s = alpha / r."""
        return self.alpha / self.r


def trainable_parameter_count(config: DeloConfig, linears: Mapping[str, tuple[int, int]]) -> int:
    """Trainable parameters of one task, in closed form.

    Args:
        config: of the adapter.
        linears: name -> (d_in, d_out) of every adapted linear, language and projector.

    Returns:
        Pools E·(d_in + d_out) per linear and modality, plus the router (none when nothing can train it) and
        the learned map.
    """
    e, r, latent, d = config.pool_size, config.r, config.latent, config.hidden_size
    slots = [
        (name, widths)
        for name, widths in linears.items()
        for _ in range(1 if config.is_projector(name) else 2)
    ]
    total = sum(e * sum(widths) for _, widths in slots)
    if config.cross_modal == "linear":
        total += 4 * d * latent
    if config.gate == "none":
        return total
    total += 2 * latent * d + len(slots) * 2 * e * (latent + 1)
    if config.conditional == "table":
        total += len(slots) * r * e * e
    elif config.conditional == "factor":
        total += sum(r * widths[0] * e for _, widths in slots)
    return total
