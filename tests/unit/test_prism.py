"""PRISM as a method: what it protects through a real optimiser, over clients and in training; its router;
what it keeps. (Invariants I3 to I5, I12 and I13; the others are in test_prism_subspace.py.)"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_support import Bench, Story, items, story
from method_support import START
from safetensors.torch import load_file
from torch import Tensor

from delo_llava.adapters.lowrank import LowRankLayer
from delo_llava.adapters.own import TENSORS
from delo_llava.engines.single import SingleTrained
from delo_llava.errors import DeloError
from delo_llava.methods._lowrank import ADAPTER
from delo_llava.methods.base import Past, Stage
from delo_llava.methods.prism.protection import BASES, Protection, Room
from delo_llava.methods.prism.sides import sides_of

E, RHO = 2, 2
#: A square linear and one that is not, of two layers.
SHAPES = {
    f"base_model.model.layers.{layer}.{name}.lowrank_{part}.default.weight": torch.Size(size)
    for layer in (0, 1)
    for name, width, out in (("q_proj", 24, 24), ("up_proj", 24, 36))
    for part, size in (("A", (E * RHO, width)), ("B", (out, E * RHO)))
}
ROOM = Room(budget=3, sketch=6)


def protection(shared: bool = True, **room: Any) -> Protection:
    return Protection(sides_of(SHAPES, shared), E, replace(ROOM, **room))


def drawn(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(size, generator=chance) for name, size in SHAPES.items()}


def masses(*weights: float) -> dict[str, Tensor]:
    linears = {side.linear for side in sides_of(SHAPES, True)}
    return {linear: torch.tensor(weights, dtype=torch.float64) for linear in linears}


def closed(known: Protection) -> Protection:
    """After the end of a task of one client."""
    known.unite([known.factors()], [1.0], known.ranks(), known.interference())
    return known


def taught(seed: int = 0, **options: Any) -> Protection:
    """A protection after one task of five steps."""
    known = protection(**options)
    for step in range(5):
        known.observe(drawn(100 * seed + step), masses(0.7, 0.3), False)
    return closed(known)


def leak(known: Protection, change: dict[str, Tensor]) -> float:
    """The largest share of an expert's change that lies inside its basis."""
    shares = []
    for side in known.sides:
        rows = side.rows(change[side.parameter].double(), E)
        inner = rows @ known.bases[side.basis].double()
        shares.append(float((inner.norm(dim=(-2, -1)) / rows.norm(dim=(-2, -1))).max()))
    return max(shares)


# ---- which bases there are
def test_square_linears_share_a_basis_and_others_have_two() -> None:
    names = [side.basis for side in sides_of(SHAPES, True) if ".0." in side.basis]
    assert names == [f"layers.0.{n}" for n in ("q_proj/both", "q_proj/both", "up_proj/in", "up_proj/out")]
    assert len({side.basis for side in sides_of(SHAPES, False)}) == 8
    units = {side.unit: side.width for side in sides_of(SHAPES, True)}
    assert units == {f"layers.{i}/{width}": width for i in (0, 1) for width in (24, 36)}


def test_rows_of_an_expert_are_its_own_and_come_back() -> None:
    tensors = drawn(3)
    for side in sides_of(SHAPES, True):
        tensor = tensors[side.parameter]
        rows = side.rows(tensor, E)
        own = tensor[:, RHO:].T if side.outputs else tensor[RHO:]
        assert torch.equal(rows[1], own) and torch.equal(side.tensor(rows), tensor)


def test_covariances_are_weighted_by_the_routing_mass() -> None:
    """Equation 1 against the dense matrices, on few enough rows that the sketch is exact."""
    known, dense = protection(sketch=24), dict[str, Tensor]()
    for step in range(3):
        gradients, mass = drawn(step), masses(0.1 * step, 1 - 0.1 * step)
        known.observe(gradients, mass, False)
        for side in known.sides:
            rows = side.rows(gradients[side.parameter].double(), E)
            part = mass[side.linear][:, None, None] * (rows.mT @ rows)
            dense[side.basis] = dense.get(side.basis, torch.zeros_like(part)) + part
    for name, matrix in dense.items():
        sketch = known.sketches[name].double()
        assert torch.allclose(sketch.mT @ sketch, matrix, atol=1e-4), name


def test_interference_is_measured_by_layer_before_projection() -> None:
    known = taught()
    gradients, mass = drawn(77), masses(0.6, 0.4)
    known.observe(gradients, mass, True)
    for unit, gamma in known.interference().items():
        top = bottom = 0.0
        for side in (s for s in known.sides if s.unit == unit):
            for e in range(E):
                rows = side.rows(gradients[side.parameter].double(), E)[e]
                top += float(mass[side.linear][e] * (rows @ known.bases[side.basis][e].double()).norm() ** 2)
                bottom += float(mass[side.linear][e] * rows.norm() ** 2)
        assert gamma == pytest.approx(top / bottom) and 0 < gamma < 1
    assert known.interference().keys() == {side.unit for side in known.sides}
    known.observe(gradients, mass, False)
    assert known.interference()[unit] == pytest.approx(gamma), "outside the warm-up nothing is measured"


def test_budgets_stay_until_interference_is_known_and_then_follow_it() -> None:
    known = taught(total=9)
    assert not known.budgets and known.bases["layers.0.q_proj/both"].shape == (E, 24, 3)
    for step in range(5):
        gradients = drawn(50 + step)
        for side in known.sides:  # the first layer's gradients lie where the first task's did
            if side.unit.startswith("layers.0"):
                basis = known.bases[side.basis].double()
                rows = side.rows(gradients[side.parameter].double(), E) @ basis @ basis.mT
                gradients[side.parameter] = side.tensor(rows).float()
        known.observe(gradients, masses(0.5, 0.5), True)
    ranks = known.ranks()
    closed(known)
    assert sum(known.budgets.values()) == 9
    assert known.budgets["layers.0/24"] > known.budgets["layers.1/24"]
    assert all(known.budgets[unit] <= max(1, int(0.75 * rank)) for unit, rank in ranks.items())
    full = taught()
    full.observe(drawn(9), masses(0.5, 0.5), True)
    ranks = full.ranks()
    caps = {unit: min(max(1, int(0.75 * rank)), 6) for unit, rank in ranks.items()}
    assert closed(full).budgets == caps, "without a total, every layer keeps what it may"


# ---- protection through an optimiser
def epoch(known: Protection | None, seed: int, hook: Callable[..., None] | None = None) -> dict[str, Tensor]:
    """Forty steps of AdamW with weight decay on drawn gradients; what changed, float64."""
    parameters = {name: value.double().requires_grad_() for name, value in drawn(5).items()}
    start = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.1)
    for step in range(40):
        for name, gradient in drawn(1000 * seed + step).items():
            parameters[name].grad = gradient.double()
        if hook is not None:
            hook(parameters)
        before = {name: p.detach().clone() for name, p in parameters.items()}
        optimizer.step()
        if known is not None:
            for name, value in exact(known, before, parameters).items():
                parameters[name].data.copy_(value)
    return {name: p.detach() - start[name] for name, p in parameters.items()}


def exact(known: Protection, before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    """`Protection.project` from a start at zero, whose result then is rounded relative to the change."""
    zero = {name: torch.zeros_like(value) for name, value in before.items()}
    change = {name: after[name].detach() - before[name] for name in before}
    return {name: before[name] + moved.double() for name, moved in known.project(zero, change, 1.0).items()}


def test_i3_an_epoch_of_adam_leaves_no_trace_inside() -> None:
    known = taught()
    assert leak(known, epoch(None, 1)) > 0.1
    assert leak(known, epoch(known, 1)) < 1e-6


def test_projecting_the_gradient_before_adam_would_leak() -> None:
    """Negative control: the released order."""
    known = taught()

    def released(parameters: dict[str, Tensor]) -> None:
        for side in known.sides:
            rows, basis = side.rows(parameters[side.parameter].grad, E), known.bases[side.basis].double()  # type: ignore[arg-type]
            parameters[side.parameter].grad = side.tensor(rows - rows @ basis @ basis.mT)

    assert leak(known, epoch(None, 1, released)) > 0.01


def test_i4_averages_of_clients_stay_outside_and_i5_local_bases_fail() -> None:
    clients, shared = [0.5, 0.2, 0.15, 0.1, 0.05], taught()
    moved = [epoch(shared, seed) for seed in range(5)]

    def average(changes: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {n: sum(w * c[n] for w, c in zip(clients, changes, strict=True)) for n in SHAPES}  # type: ignore[misc]

    assert leak(shared, average(moved)) < 1e-6
    local = [taught(seed + 1) for seed in range(5)]
    own = [epoch(known, seed) for seed, known in enumerate(local)]
    assert all(leak(known, change) < 1e-6 for known, change in zip(local, own, strict=True))
    assert all(leak(known, average(own)) > 0.05 for known in local)


def test_a_server_needs_nothing_but_what_clients_tell() -> None:
    """Two clients with the same gradients, one of them split in two, make the bases that one makes alone."""
    one, server = protection(), protection()
    one.observe(drawn(1), masses(0.5, 0.5), False)
    told = [one.factors() for _ in range(3)]
    server.unite(told, [0.5, 0.25, 0.25], one.ranks(), {})
    closed(one)
    for name, basis in one.bases.items():
        mine = server.bases[name]
        assert torch.allclose(mine @ mine.mT, basis @ basis.mT, atol=1e-5)


# ---- what is kept
def test_i13_going_on_from_files_gives_the_same_bits(tmp_path: Path) -> None:
    memory, files = taught(), protection()
    taught().save(tmp_path)
    files.load(tmp_path)
    for known in (memory, files):
        for step in range(3):
            known.observe(drawn(20 + step), masses(0.4, 0.6), True)
    again = protection()
    again.load(tmp_path)
    again.resume(files.running())
    for known in (memory, files, again):
        known.observe(drawn(30), masses(0.4, 0.6), True)
        closed(known)
    for other in (files, again):
        assert other.budgets == memory.budgets and other.gamma == memory.gamma and memory.gamma
        for kind in ("bases", "values"):
            mine, theirs = getattr(memory, kind), getattr(other, kind)
            assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
    assert not memory.running(), "covariances are those of one task"


def test_missing_bases_are_told(tmp_path: Path) -> None:
    with pytest.raises(DeloError, match="bases of a stage cannot be read"):
        protection().load(tmp_path)


# ---- the method
def layers(model: Any) -> list[LowRankLayer]:
    return [m for m in model.modules() if isinstance(m, LowRankLayer)]


def tale(folder: Path, *words: str, **options: Any) -> Story:
    """Both tasks with other options than the contract's."""
    told = Story(Bench("prism", "llava", "none", *words, **options))
    for stage in told.bench.stages():
        stage = replace(stage, past=told.past(stage.index))
        told.stages.append(stage)
        told.trained.append(told.bench.train(stage, folder / stage.name))
    return told


def trained(told: Any, stage: int) -> dict[str, Tensor]:
    return load_file(told.trained[stage].folder / TENSORS)


def test_i12_the_router_learns_in_the_first_task_and_then_stays() -> None:
    bench = Bench("prism")
    assert bench.method.options.top_k == 1  # type: ignore[attr-defined]
    model = bench.begin(Stage(0, "task0"))
    for layer in layers(model):
        torch.nn.init.normal_(layer.lowrank_B[ADAPTER].weight, std=0.1)  # type: ignore[arg-type]
    bench.method.loss_sums(model, bench.batch(items("task0")))["answer"].backward()
    for layer in layers(model):
        gradient: Any = layer.lowrank_R[ADAPTER].weight.grad  # type: ignore[union-attr]
        assert float(gradient.abs().sum()) > 0, layer.name
    told = story("prism")
    first, second = trained(told, 0), trained(told, 1)
    routers = [name for name in first if "lowrank_R" in name]
    assert len(routers) == len(layers(model))
    for name in routers:
        assert torch.equal(first[name], second[name])
        assert not torch.equal(first[name], told.trained[0].start[name.replace(".weight", ".default.weight")])


def test_training_leaves_the_bases_alone(tmp_path: Path) -> None:
    """What the second task changed in the adapter itself, fp32; a projection that never gets strong leaks."""
    shares = []
    for epochs in (0.0, 1e6):
        told = tale(tmp_path / str(epochs), "--train.epochs=3", warmup_epochs=epochs)
        done = told.trained[1]
        known = Protection(sides_of({n: value.shape for n, value in done.start.items()}, True), E, Room())
        known.load(told.trained[0].folder)
        change = {name: (done.end[name] - done.start[name]).double() for name in done.start}
        for side in known.sides:
            rows, basis = side.rows(change[side.parameter], E), known.bases[side.basis].double()
            assert float(rows.norm()) > 1e-4
            shares.append(float((rows @ basis).norm() / rows.norm()))
    half = len(shares) // 2
    assert max(shares[:half]) < 1e-4, "rounding of fp32 weights, no more"
    assert min(shares[half:]) > 1e-3


def test_the_projection_grows_to_full_strength() -> None:
    method: Any = Bench("prism").method
    asked: list[float] = []
    method.protection.bases = {"there is": torch.zeros(1)}
    method.protection.project = lambda before, after, strength: asked.append(strength) or {}
    parameter = SingleTrained({}, None)
    for step in (0, 4, 9, 10, 99):
        method.after_step(parameter, {}, replace(START, step=step))
    assert asked == [0.1, 0.5, 1.0, 1.0, 1.0]


def test_the_routing_mass_counts_tokens_and_no_padding() -> None:
    """Rows together, of which some are padded, weigh as each alone; rows without image add nothing to the
    projector's.
    """
    bench = Bench("prism")
    method: Any = bench.method
    model = bench.begin(Stage(0, "task0"))

    def mass(rows: list[Any]) -> dict[str, Tensor]:
        batch = bench.batch(rows)
        with torch.no_grad():
            method.loss_sums(model, batch)
        method.after_backward(model, batch, START)
        found, method._mass = method._mass, {}
        return found

    together = mass(items("task0"))
    single = [mass([item]) for item in items("task0")]
    lengths = [int(bench.batch([item]).inputs["attention_mask"].sum()) for item in items("task0")]
    for name, value in together.items():
        parts = [one[name] for one in single if name in one]
        assert torch.allclose(value, torch.stack(parts).sum(0)), name
        images = bench.backbone.projector_name in name
        assert float(value[-1]) == (3 * 16 if images else sum(lengths))
        assert float(value[:-1].sum()) == pytest.approx(float(value[-1])), "every token weighs one"


def test_a_step_that_is_not_finite_leaves_no_trace() -> None:
    bench = Bench("prism")
    method: Any = bench.method
    model = bench.begin(Stage(0, "task0"))
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for parameter in named.values():
        parameter.grad = torch.full_like(parameter, float("nan"))
    method.before_step(SingleTrained(named, None), START)
    assert not method.state_dict()


def test_the_stored_bytes_are_counted() -> None:
    told = story("prism")
    stored = (told.trained[1].folder / BASES).stat().st_size
    assert stored <= told.bench.method.footprint(told.bench.base()).stored_bytes * 1.2


def test_two_bases_for_square_linears_too(tmp_path: Path) -> None:
    told = tale(tmp_path, bases="two")
    names = load_file(told.trained[0].folder / BASES)
    assert not any(name.endswith("/both") for name in names)
    assert any(name.endswith("q_proj/out") for name in names)


def test_loading_needs_no_bases(tmp_path: Path) -> None:
    """Answers come from the adapter alone."""
    told = story("prism")
    for file in told.trained[1].folder.iterdir():
        if not file.name.startswith("prism"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    model = told.bench.loaded({"task1": Past(tmp_path, told.stages[1].tasks)})
    whole = told.bench.loaded(told.past(2))
    assert torch.equal(*(told.bench.logits(m, items("task1")) for m in (model, whole)))
