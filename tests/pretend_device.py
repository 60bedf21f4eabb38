"""A device that is none: tensors that lie in ordinary memory, say they are elsewhere, and meet CPU tensors
only where CUDA lets them. A line that would die on the first GPU dies in a test without one.

    with pretend_device():
        model = moved(model)  # on PRETEND
        model(torch.ones(2, device=PRETEND))  # a CPU tensor here raises, as it would on CUDA

What is told apart is where tensors lie, not what CUDA computes: random numbers are the CPU's, and there are
no streams, no pinned memory and no kernels of its own (4 bit, fused optimisers).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

#: A kind of device that no build of torch computes on, but whose tensors autograd accepts in every build.
PRETEND = torch.device("lazy", 0)
CPU = torch.device("cpu")
#: `torch.tensor` reads the numbers in a list of tensors behind every mode's back.
_KERNELS = torch.library.Library("aten", "IMPL")
_KERNELS.impl("_local_scalar_dense", lambda tensor: tensor.here.item(), "Lazy")
#: Of operators that change the form of a tensor alone.
META = torch._C.DispatchKeySet(torch._C.DispatchKey.Meta)
#: Operators that take their arguments from anywhere: what is copied, and the entries of an index.
CROSSING = {"aten::copy_", "aten::_foreach_copy_"}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
#: Beside pointwise operators of two tensors, those that take a CPU tensor without dimensions for a number.
NUMBERS = {"aten::where", "aten::fill", "aten::fill_", "aten::masked_fill", "aten::masked_fill_"}


class Elsewhere(Tensor):
    """A tensor that says it lies on `PRETEND`; `here` is where its numbers are."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> "Elsewhere":
        shape = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        make: Any = Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
        made: Elsewhere = make(cls, here.shape, device=PRETEND, **shape)
        made.here = here
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """The tensor apart from autograd."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        """Other numbers of the same shape; not the CPU's, with which a model would lie in two places."""
        if not isinstance(value, Elsewhere) or (value.shape, value.dtype) != (self.shape, self.dtype):
            raise RuntimeError(f"data of a tensor on {PRETEND} was set to {value.dtype} on {value.device}")
        self.here.copy_(value.here)

    def numpy(self, *, force: bool = False) -> Any:
        """Only of the CPU's tensors, as of CUDA's."""
        if not force:
            raise TypeError(f"can't convert {PRETEND} device type tensor to numpy. Use Tensor.cpu() first")
        return self.here.numpy()

    def tolist(self) -> Any:
        """Its numbers."""
        return self.here.tolist()

    def untyped_storage(self) -> Any:
        """Where its numbers are, which tells tensors that share them."""
        return self.here.untyped_storage()

    def __repr__(self, **options: Any) -> str:
        return f"Elsewhere({self.here!r})"


class _Factories(TorchDispatchMode):
    """What is made on `PRETEND` from nothing, or moved there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def pretend_device() -> Iterator[None]:
    """In it there is a device `PRETEND`."""
    autocast: Callable[..., Any] = torch.autocast

    def known(device_type: str, *args: Any, **options: Any) -> Any:
        return autocast("cpu" if device_type == PRETEND.type else device_type, *args, **options)

    def enter(self: Any) -> None:
        """Operators would come whole, and what they make in themselves could not be seen."""
        self._inference_mode_context = torch.no_grad() if self.mode else nullcontext()
        self._inference_mode_context.__enter__()

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "autocast", known))
        stack.enter_context(mock.patch.object(torch.inference_mode, "__enter__", enter))
        stack.enter_context(_Factories())
        # torch.tensor(…, device=PRETEND) is made on the CPU and then moved, which the mode sees.
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        yield


def moved(model: nn.Module) -> nn.Module:
    """The model itself, its tensors on `PRETEND`; parameters that were one stay one."""
    known: dict[Tensor, Tensor] = {}

    def there(tensor: Tensor) -> Tensor:
        if tensor not in known:
            weight, new = isinstance(tensor, nn.Parameter), Elsewhere(tensor.detach())
            known[tensor] = nn.Parameter(new, tensor.requires_grad) if weight else new
        return known[tensor]

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            held.update({name: there(tensor) for name, tensor in held.items() if tensor is not None})
    return model


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator on the numbers themselves, after a look at where each tensor says it lies."""
    wanted = kwargs.get("device")
    wanted = None if wanted is None else torch.device(wanted)
    given = [*enumerate(args), *kwargs.items()]
    found = [(key, leaf) for key, value in given for leaf in _leaves(value) if isinstance(leaf, Tensor)]
    onto = any(isinstance(tensor, Elsewhere) for _, tensor in found)
    if not onto and (wanted is None or wanted.type != PRETEND.type):
        return func(*args, **kwargs)
    form = _form(func)
    _require_together(form, [(form.names[key] if isinstance(key, int) else key, t) for key, t in found])
    if wanted is not None:
        onto, kwargs = wanted.type == PRETEND.type, kwargs | {"device": CPU}
    if onto and isinstance(kwargs.get("generator"), torch.Generator):
        raise RuntimeError(f"Expected a '{PRETEND.type}' device type for generator but found 'cpu'")
    result = func(*map(_here, args), **{key: _here(value) for key, value in kwargs.items()})
    written = dict(zip(form.names, args, strict=False)) | kwargs
    if len(form.returned) == 1:
        return _given_back(result, form.returned[0], written, onto)
    returned = zip(result or (), form.returned, strict=True)
    return tuple(_given_back(value, name, written, onto) for value, name in returned) or None


@dataclass(frozen=True)
class Form:
    """What an operator's signature says.

    Attributes:
        names: of its arguments; written: of those that it writes into.
        returned: for each value, the name of the argument that is given back, or None for a new value.
        numbers: whether a CPU tensor without dimensions stands for a number in it.
    """

    name: str
    names: tuple[str, ...]
    written: frozenset[str]
    returned: tuple[str | None, ...]
    numbers: bool


@cache
def _form(func: Any) -> Form:
    schema = func._schema
    aliases = {a.name: a.alias_info for a in schema.arguments if a.alias_info and a.alias_info.is_write}
    returned = [
        next((n for n, a in aliases.items() if info and a.before_set & info.before_set), None)
        for info in (value.alias_info for value in schema.returns)
    ]
    tensors = sum("Tensor" in str(a.type) for a in schema.arguments if a.name != "out")
    pairs = torch.Tag.pointwise in func.tags and tensors < 3
    numbers = schema.name in NUMBERS or schema.name in INDEXING or pairs
    names = tuple(argument.name for argument in schema.arguments)
    return Form(schema.name, names, frozenset(aliases), tuple(returned), numbers)


def _leaves(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


def _here(value: Any) -> Any:
    if isinstance(value, Elsewhere):
        return value.here
    return type(value)(map(_here, value)) if type(value) in (list, tuple) else value


def _require_together(form: Form, found: list[tuple[str, Tensor]]) -> None:
    """Raise where CUDA would: tensors that may not meet."""
    if form.name in CROSSING or all(isinstance(tensor, Elsewhere) for _, tensor in found):
        return
    there = {argument for argument, tensor in found if isinstance(tensor, Elsewhere)}
    for argument, tensor in found:
        free = argument == "indices" and form.name in INDEXING and "self" in there
        number = form.numbers and tensor.dim() == 0 and argument not in form.written
        if there and not (isinstance(tensor, Elsewhere) or free or number):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but got {argument} is on cpu, different "
                f"from other tensors on {PRETEND} (when checking arguments of {form.name})"
            )


def _given_back(result: Any, name: str | None, given: dict[str, Any], onto: bool) -> Any:
    """What an operator returns: the argument that it wrote into, else new tensors."""
    if name is None:
        return _there(result) if onto else result
    for tensor in _leaves(given[name]):
        if isinstance(tensor, Elsewhere) and _laid(tensor) != _laid(tensor.here):  # squeeze_, in matmul
            torch.ops.aten.as_strided_.default.redispatch(META, tensor, *_laid(tensor.here))
    return given[name]


def _laid(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.size(), tensor.stride(), tensor.storage_offset()


def _there(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Elsewhere(value)
    return type(value)(map(_there, value)) if type(value) in (list, tuple) else value
