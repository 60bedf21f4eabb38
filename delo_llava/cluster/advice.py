"""Which settings fit a GPU, which of them is the best choice, and which combinations cannot work at all."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from delo_llava.cluster.memory import MemoryModel, Parts, Setup
from delo_llava.cluster.models import planned_model
from delo_llava.config import RunConfig
from delo_llava.data.sampler import plan_accumulation
from delo_llava.errors import DeloError
from delo_llava.strict import parse_json, read_json

#: GPU memory that is sold, in GiB.
GPU_SIZES = (24, 40, 80)
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)

#: Relative time of a step. Recomputing is one more forward (4/3); QLoRA ÷ LoRA was published as 1.02 to 1.44;
#: the others are assumed. They order the choices and are no prediction (docs/plan.md).
SLOWER = {"nf4": 1.25, "checkpointing": 1.33, "offload": 1.05, "zero3": 1.3}
#: Kernel launches and small matrices make tiny micro-batches slower: 1 + this / rows.
SMALL = 0.5


@dataclass(frozen=True)
class Choice:
    """Settings with the memory they need and their relative time (lower is faster)."""

    setup: Setup
    parts: Parts
    cost: float


def relative_time(setup: Setup) -> float:
    """Expected time of a sample under `setup`, relative to bf16, ZeRO-2, no recomputation, large batches."""
    cost = 1 + SMALL / setup.micro_batch
    cost *= SLOWER["nf4"] if setup.quant == "nf4" else 1
    cost *= SLOWER["checkpointing"] if setup.checkpointing else 1
    cost *= SLOWER["offload"] if setup.zero.endswith("offload") else 1
    return cost * (SLOWER["zero3"] if setup.zero == "3" else 1)


def candidates(config: RunConfig, world: int) -> Iterable[Setup]:
    """Every combination that could run the configuration's global batch on `world` ranks."""
    per_rank = config.train.global_batch // world
    rows = [m for m in MICRO_BATCHES if per_rank and per_rank % m == 0]
    stages = ("2", "2_offload", "3") if world > 1 else ("2", "2_offload")
    for quant in ("nf4", "none"):
        for zero in stages:
            for checkpointing in (False, True):
                yield from (Setup(quant, zero, checkpointing, m, world) for m in rows)


def best_choice(memory: MemoryModel, config: RunConfig, world: int, gib: float) -> Choice | None:
    """The fastest combination that fits `gib` GiB a GPU; None when none does."""
    for setup in sorted(candidates(config, world), key=relative_time):
        parts = memory.training(setup)
        if parts.needed <= gib * 2**30:
            return Choice(setup, parts, relative_time(setup))
    return None


def largest_answer_batch(memory: MemoryModel, quant: str, stored: int, new_tokens: int, gib: float) -> int:
    """How many questions can be decoded at once on a GPU of `gib` GiB; 0 when not even one."""
    one, two = (memory.evaluation(quant, rows, stored, new_tokens).total for rows in (1, 2))
    return max(0, int(1 + (gib * 2**30 - one) // (two - one)))


def setup_of(config: RunConfig, world: int) -> Setup:
    """The settings that a configuration asks for."""
    train = config.train
    return Setup(config.quant, config.zero, train.gradient_checkpointing, train.micro_batch, world)


def planned_bytes(config: RunConfig, world: int, cuda: bool) -> int:
    """What one rank needs at most while a stage trains, with sequences as long as they may be."""
    memory = MemoryModel(planned_model(config.model), config, config.data.max_length, cuda)
    return int(memory.training(setup_of(config, world)).total)


def refuse_impossible(config: RunConfig, world: int) -> None:
    """Refuse combinations known not to work, with the nearest one that does.

    Raises:
        DeloError: naming the nearest valid settings.
    """
    setup = setup_of(config, world)
    if config.zero == "none" and world > 1:
        raise DeloError(
            "The one-process engine cannot run on several GPUs",
            given=setup.label(),
            fix=replace(setup, zero="2").label(),
        )
    plan_accumulation(config.train.global_batch, config.train.micro_batch, world)
    if config.attn == "flash_attention_2" and config.dtype == "float32":
        raise DeloError(
            "flash_attention_2 knows no fp32", given="--dtype float32", fix="--dtype bfloat16, or --attn sdpa"
        )


def communication(memory: MemoryModel, setup: Setup, accumulation: int) -> float:
    """Bytes that one GPU sends and receives in an optimiser step: gradients reduced, parameters gathered.

    ZeRO-3 gathers the frozen base for every forward and every backward pass on top of it.
    """
    if setup.world == 1:
        return 0.0
    share = (setup.world - 1) / setup.world
    trained = 2 * 4 * memory.footprint.parameters * share
    if setup.zero != "3":
        return trained
    return trained + 2 * accumulation * memory.base_bytes(setup.quant)[0] * share


def disk(memory: MemoryModel, tasks: int, checkpoints: int) -> dict[str, float]:
    """Bytes that a whole run leaves on disk, and the most that step checkpoints take meanwhile."""
    p, untrained = memory.footprint.parameters, memory.footprint.untrained
    return {
        "adapters": tasks * (4.0 * (p + untrained) + memory.footprint.stored_bytes),
        "step checkpoints": checkpoints * (12.0 * p + memory.footprint.stored_bytes),
    }


def measured_throughput(run: Path) -> tuple[float, int]:
    """Samples per second in all, and ranks, as a finished run logged them (median over its steps).

    Raises:
        DeloError: the folder holds no log of steps.
    """
    from statistics import median

    log, record = run / "logs" / "metrics.jsonl", run / "run.json"
    if not log.is_file() or not record.is_file():
        raise DeloError("There is no log of steps in this run", given=run, fix="name a run that was trained")
    try:
        lines = [parse_json(line) for line in log.read_text().splitlines()]
    except ValueError as error:
        raise DeloError(f"The log of steps is damaged: {error}", given=log) from error
    rates: Sequence[float] = [line["samples_per_second"] for line in lines if "samples_per_second" in line]
    worlds = [stage["world"] for stage in read_json(record, "run.json").get("stages", {}).values()]
    if not rates or not worlds:
        raise DeloError("No step of this run was logged", given=log)
    return float(median(rates)), int(worlds[-1])
