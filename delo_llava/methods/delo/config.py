"""Configuration of a DeLo adapter, and its size in closed form."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from delo_llava.adapters.tuner import LinearsConfig
from delo_llava.errors import DeloError


class DeloType(str, Enum):  # noqa: UP042 (PEFT shows what follows the point of `str(key)`)
    """PEFT's key of this tuner."""

    DELO = "DELO"


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
        pools: `modality` keeps a pool for each modality, `shared` one for both (the selectors stay apart).
        conditional: `table`, `none` or `factor`: how the choice of B depends on that of A.
        latent: width of the router's down-projection, and rank of the learned cross-modal map.
        cross_modal: `identity`, `linear`, `ridge`, or `none`.
    """

    r: int = 4
    pool_size: int = 16
    alpha: float = 8.0
    scope: Literal["own", "all"] = "own"
    pools: Literal["modality", "shared"] = "modality"
    gate: Literal["ste", "none", "softmax"] = "ste"
    temperature: float = 1.0
    conditional: Literal["table", "none", "factor"] = "table"
    latent: int = 64
    cross_modal: Literal["identity", "linear", "ridge", "none"] = "identity"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = DeloType.DELO
        if not 1 <= self.r <= self.pool_size:
            raise DeloError(
                "The rank must lie between 1 and the pool size",
                given=self.r,
                fix=f"choose r <= {self.pool_size}",
            )
        choices = {
            "scope": ("own", "all"),
            "pools": ("modality", "shared"),
            "gate": ("ste", "none", "softmax"),
            "conditional": ("table", "none", "factor"),
        }
        for name, allowed in (choices | {"cross_modal": ("identity", "linear", "ridge", "none")}).items():
            if getattr(self, name) not in allowed:
                raise DeloError(f"Unknown {name}", given=getattr(self, name), allowed=allowed)

    @property
    def scale(self) -> float:
        """s = alpha / r."""
        return self.alpha / self.r

    def pool_starts(self, projector: bool = False) -> tuple[int, int]:
        """Where the text pool begins in a linear's table of factors, and the factors of the table."""
        text = self.pool_size if self.pools == "modality" and not projector else 0
        return text, text + self.pool_size


def trainable_parameter_count(config: DeloConfig, linears: Mapping[str, tuple[int, int]]) -> int:
    """Trainable parameters of one task, in closed form.

    Args:
        config: of the adapter.
        linears: name -> (d_in, d_out) of every adapted linear, language and projector.

    Returns:
        Pools E·(d_in + d_out) per linear and modality (per linear, where the modalities share one), plus the
        router (none when nothing can train it) and the learned map.
    """
    total = sum(
        config.pool_starts(config.is_projector(name))[1] * sum(widths) for name, widths in linears.items()
    )
    if config.cross_modal == "linear":
        total += 4 * config.hidden_size * config.latent
    return total + router_parameter_count(config, linears)


def router_parameter_count(config: DeloConfig, linears: Mapping[str, tuple[int, int]]) -> int:
    """Trainable parameters of one task's router; arguments as of `trainable_parameter_count`."""
    e, r, latent, d = config.pool_size, config.r, config.latent, config.hidden_size
    slots = [
        (name, widths)
        for name, widths in linears.items()
        for _ in range(1 if config.is_projector(name) else 2)
    ]
    if config.gate == "none":
        return 0
    total = 2 * latent * d + len(slots) * 2 * e * (latent + 1)
    if config.conditional == "table":
        total += len(slots) * r * e * e
    elif config.conditional == "factor":
        total += sum(r * widths[0] * e for _, widths in slots)
    return total
