"""A hyperparameter: a tensor that stands where a plain number stood."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import yaml
from torch import Tensor

from lightning_rtho._numerics import HOST, place_of_doubles, sent_to, tensors_in
from lightning_rtho.hyperparameters._domains import Domain, Interval, NonNegative, Positive, Real

__all__ = ["Hyperparameter"]


class Number(Tensor):
    """A scalar tensor that behaves as a Python number does among other tensors.

    A Python number never changes the dtype of what it meets; a float64 scalar tensor would. While
    no gradient is asked of it, a `Number` *is* the Python number, bit for bit, in every operation;
    while it is live (``requires_grad``) it is cast to the dtype that the number would have been
    cast to, differentiably. Tensors with a shape behave as ordinary tensors.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run `func`, with numbers in the place of scalar hyperparameters among its arguments."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.autograd.grad:
                return _grad(*args, **kwargs)
            if _acts_on_first_argument(func, args):
                return func(*args, **kwargs)
            leaves = list(tensors_in((args, kwargs)))
            place = next((x.device for x in map(_acting, leaves) if _is_far_number(x)), None)
            if place is not None and not _reads(func):
                stand_in = functools.partial(_stand_in, place)
                args, kwargs = _map_numbers(args, stand_in), _map_numbers(kwargs, stand_in)
                leaves = list(tensors_in((args, kwargs)))
            others = [leaf for leaf in leaves if not _is_number(leaf)]
            if len({leaf.device for leaf in others}) > 1:
                args, kwargs = _brought_together(func, args, kwargs, others)
            if others and len(others) < len(leaves):
                return _call_with_numbers(func, args, kwargs, others)
            try:
                result = func(*args, **kwargs)
            except RuntimeError as error:
                if "not differentiable with respect to argument" in str(error):
                    error.add_note(_WHERE_NO_WEIGHTS_GO)
                raise
            if others or type(result) is not Tensor or not result.is_floating_point():
                return result
            if result.dim() == 0:
                return result.as_subclass(Number)
            # Once it is given a shape it is an ordinary tensor, of the ordinary dtype, and of the
            # host again, as it is while nothing is live.
            back = result if place is None else result.to(HOST)
            return back.to(torch.get_default_dtype())

    def __neg__(self) -> Any:
        """Negate; a Python number while nothing is live."""
        return self * -1

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """Move to another device; a scalar keeps its precision whatever dtype is asked for."""
        moved: Tensor = super().to(*args, **kwargs)
        if self.dim() > 0:
            return moved
        return self if moved.device == self.device else super().to(device=moved.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Copy the value; the copy is not live."""
        if id(self) not in memo:
            memo[id(self)] = self.detach().clone()
        copied: Tensor = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the value."""
        # No copy: between processes the memory itself is handed over, and has to stay.
        return Number, (self.as_subclass(Tensor).detach(),)

    def __round__(self, ndigits: int | None = None) -> float:
        """Round a scalar as the number it is."""
        return round(self.item(), ndigits)

    def __format__(self, format_spec: str) -> str:
        """Format a scalar as the number it is."""
        return format(self.item() if self.dim() == 0 else repr(self), format_spec)


_WHERE_NO_WEIGHTS_GO = (
    "A hyperparameter stands where torch takes constants alone. Weigh the terms instead: "
    "`weights[target] * cross_entropy(input, target, reduction='none')` for class weights."
)


_READING = frozenset({
    *("item", "tolist", "numpy", "detach", "__array__", "__bool__", "__float__", "__int__"),
    *("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "eq", "ne", "lt", "le", "gt"),
    *("ge", "__index__", "dim", "size", "numel", "bernoulli", "multinomial", "normal", "poisson"),
})


def _reads(func: Callable[..., Any]) -> bool:
    """Whether `func` asks for values, which the host has at hand, or has no derivative."""
    name = getattr(func, "__name__", "")
    return name in _READING or name.endswith("_like") or name.startswith("new_")


def _twin_of(number: Any) -> Tensor | None:
    """Return the twin on a device by which a live hyperparameter acts, where it has one."""
    twin: Tensor | None = getattr(number, "_twin", None)
    return twin if twin is not None and number.requires_grad else None


def _acting(operand: Any) -> Any:
    """Return the twin of what has one; else what it is."""
    twin = _twin_of(operand)
    return operand if twin is None else twin


def _is_far_number(value: Tensor) -> bool:
    return not value.is_cpu and _is_number(value)


def _stand_in(device: torch.device, number: Tensor) -> Tensor:
    """Return what stands for a number in a function of which some act on a device."""
    return sent_to(device, _acting(number))


def _brought_together(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    leaves: Sequence[Tensor],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Send hyperparameters with a shape to the one device where the others are, as numbers go."""
    is_indexing = func is Tensor.__getitem__
    devices = {
        leaf.device
        for leaf in leaves
        if not isinstance(leaf, Number)
        # On the host, scalars and indices meet tensors of any device.
        and not (leaf.device.type == "cpu" and (leaf.dim() == 0 or is_indexing))
    }
    if len(devices) != 1:
        return args, kwargs
    (device,) = devices

    def send(leaf: Tensor) -> Tensor:
        return leaf.as_subclass(Tensor).to(device) if leaf.dim() > 0 else leaf

    return _map_hyperparameters(args, send), _map_hyperparameters(kwargs, send)


def _map_numbers(tree: Any, function: Callable[[Tensor], Any]) -> Any:
    """Replace the scalar hyperparameters in nested tuples, lists and dicts."""
    return _map_hyperparameters(tree, lambda leaf: function(leaf) if leaf.dim() == 0 else leaf)


def _map_hyperparameters(tree: Any, function: Callable[[Tensor], Any]) -> Any:
    """Replace the hyperparameters in nested tuples, lists and dicts."""
    if isinstance(tree, (tuple, list)):
        items = [_map_hyperparameters(item, function) for item in tree]
        return items if isinstance(tree, list) else tuple(items)
    if isinstance(tree, dict):
        return {key: _map_hyperparameters(item, function) for key, item in tree.items()}
    return function(tree) if isinstance(tree, Number) else tree


def _is_number(value: Any) -> bool:
    return isinstance(value, Number) and value.dim() == 0


def _grad(
    outputs: Any, inputs: Any, *args: Any, allow_unused: bool | None = None, **kwargs: Any
) -> Any:
    """``torch.autograd.grad``, by hyperparameters wherever they act: themselves, or by twins."""
    grad: Any = torch.autograd.grad
    leaves = [inputs] if isinstance(inputs, Tensor) else inputs
    twins = {i: twin for i, x in enumerate(leaves) if (twin := _twin_of(x)) is not None}
    if not twins:
        return grad(outputs, inputs, *args, allow_unused=allow_unused, **kwargs)
    found = grad(outputs, [*leaves, *twins.values()], *args, allow_unused=True, **kwargs)
    gradients = list(found[: len(leaves)])
    for (i, twin), part in zip(twins.items(), found[len(leaves) :], strict=True):
        own = gradients[i]
        if own is not None:  # as of an `autograd.Function`, which takes it as it is
            with torch.enable_grad():  # both may have graphs
                own = sent_to(twin.device, own)
                part = own if part is None else own + part
        gradients[i] = part
    if not allow_unused and any(gradient is None for gradient in gradients):
        raise RuntimeError(
            "One of the differentiated tensors appears not to have been used in the graph. Set "
            "`allow_unused=True` if this is the desired behavior."
        )
    return tuple(gradients)


_AUTOGRAD = frozenset({torch.autograd.backward, Tensor.backward})


def _acts_on_first_argument(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether `func` writes to, or reads a property of, the tensor it was called on."""
    if func in _AUTOGRAD:
        return True
    name = getattr(func, "__name__", "")
    writes = name in {"__get__", "__set__", "__setitem__"} or (
        name.endswith("_") and not name.startswith("__")
    )
    return writes and bool(args) and isinstance(args[0], Number)


def _read(number: Tensor) -> float:
    value: float = number.detach().item()
    return value


def _call_with_numbers(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], others: list[Tensor]
) -> Any:
    """Call `func` with each scalar hyperparameter as a number of the other tensors' dtype."""
    is_live = any(leaf.requires_grad for leaf in tensors_in((args, kwargs)) if _is_number(leaf))
    # A probability has no derivative there, and as a tensor it would draw otherwise.
    if not is_live or func is Tensor.bernoulli_:
        try:
            return func(*_map_numbers(args, _read), **_map_numbers(kwargs, _read))
        except TypeError:  # a function that takes tensors alone there, as torch.maximum does
            pass
    as_scalar = functools.partial(_cast, others=others)
    return func(*_map_numbers(args, as_scalar), **_map_numbers(kwargs, as_scalar))


def _arithmetic(name: str, reflected: bool) -> Callable[..., Any]:
    """Make an operator that does what it does with a Python number in the number's place."""
    method = f"__r{name}__" if reflected else f"__{name}__"
    on_numbers = getattr(operator, name)
    # The method of the tensor x that Python calls when a number stands beside it. It may round
    # otherwise than its twin: 0.1 / x is x.reciprocal() * 0.1.
    beside_tensor = getattr(Tensor, f"__{name}__" if reflected else f"__r{name}__")

    def apply(self: Number, other: Any) -> Any:
        if self.dim() > 0:
            return getattr(Tensor, method)(self, other)
        if isinstance(other, Tensor) and not _is_number(other):
            scalar = _operand(self, other) if self.requires_grad else self.item()
            result = beside_tensor(other, scalar)
            return result.to(torch.result_type(other, 1.0))
        number = _acting(self)
        pair = (_acting(other), number) if reflected else (number, _acting(other))
        if not any(isinstance(n, Tensor) and n.requires_grad for n in pair):
            return on_numbers(*(n.item() if isinstance(n, Tensor) else n for n in pair))
        # Tensors both: torch rounds h ** 3 and 1 / h otherwise than Python where one is a number.
        with torch._C.DisableTorchFunctionSubclass():
            plain = [torch.as_tensor(n, dtype=self.dtype).as_subclass(Tensor) for n in pair]
            far = next((n.device for n in plain if not n.is_cpu), None)
            if far is not None:  # by what the host holds a device may divide otherwise
                plain = [sent_to(far, n) for n in plain]
            return on_numbers(*plain).as_subclass(Number)

    return apply


def _cast(number: Tensor, others: Sequence[Tensor], device: torch.device | None = None) -> Tensor:
    """Turn a scalar into the tensor that stands for it beside others; None is their device."""
    floating = [other.dtype for other in others if other.is_floating_point()]
    # From float32 up: kernels of lower precision read their scalars in float32. The C type, not
    # the subclass, or the result would be a Number with no precision to keep.
    dtype = functools.reduce(
        torch.promote_types, floating or [torch.get_default_dtype()], torch.float32
    )
    with torch._C.DisableTorchFunctionSubclass():
        if device is None:
            is_beside = any(other.device == number.device for other in others)
            device = number.device if is_beside else others[0].device
        return sent_to(device, number.as_subclass(Tensor), dtype)


def _operand(number: Tensor, other: Tensor) -> Tensor:
    """Turn a scalar into the operand that stands for it in arithmetic with a tensor."""
    # Kernels of low precision read scalars in float32 only where the host holds them.
    is_low = other.is_floating_point() and other.element_size() < 4
    return _cast(number, [other], HOST) if is_low else _cast(_acting(number), [other])


for _name in ("add", "sub", "mul", "truediv", "pow"):
    setattr(Number, f"__{_name}__", _arithmetic(_name, reflected=False))
    setattr(Number, f"__r{_name}__", _arithmetic(_name, reflected=True))
    # `h *= 2` gives the name another number, as it does where `h` is one, and leaves `h`.
    setattr(Number, f"__i{_name}__", _arithmetic(_name, reflected=False))


class Hyperparameter(Number):
    """A real-valued hyperparameter, scalar or of any shape, to be moved while the model trains.

    It goes wherever the number went: into the loss, into an optimizer's keyword, into single
    parameter groups, into several places at once. It is no ``nn.Parameter`` and absent from
    ``parameters()``. Without a callback the module trains as with the plain number.

    Args:
        value: Natural start value: a number, a nested list or a tensor ``[*H]``. Scalars are kept
            in float64 whatever the module's dtype; tensors with a shape keep theirs.
        domain: The values it may take, and the coordinate in which it is moved.

    Raises:
        TypeError: If `domain` is not a `Domain`, or `value` is not real.
        ValueError: If `value` lies outside `domain`.

    Example:
        >>> from lightning_rtho import Hyperparameter, Positive
        >>> lr = Hyperparameter(1e-3, Positive())
        >>> torch.optim.SGD([torch.zeros(2)], lr=lr).param_groups[0]["lr"] is lr
        True
        >>> lr * torch.ones(2)
        tensor([0.0010, 0.0010])
    """

    domain: Domain
    is_copy: bool = False
    """Whether it was copied from another, as it is where an optimizer loads a state."""
    _assigned: Tensor
    _twin: Number | None = None
    _twin_value: float

    def __new__(cls, value: Any, domain: Domain) -> "Hyperparameter":
        """Check the value and make the tensor."""
        if not isinstance(domain, Domain):
            raise TypeError(
                f"`domain` must be a Domain such as Positive() or Interval(0, 1), got {domain!r}. "
                "Pass an instance."
            )
        with torch._C.DisableTorchFunctionSubclass():
            tensor = torch.as_tensor(value).detach().clone()
            if tensor.is_complex() or tensor.dtype is torch.bool:
                raise TypeError(f"`value` must be real numbers, got {value!r}.")
            if tensor.dim() == 0:
                exact = value if isinstance(value, (int, float)) else tensor.item()
                tensor = torch.tensor(exact, dtype=torch.float64, device=tensor.device)
            elif not tensor.is_floating_point():
                tensor = tensor.to(torch.get_default_dtype())
            outside = tensor[~domain.contains(tensor)]
            if outside.numel() > 0:
                raise ValueError(
                    f"`value` must lie in {domain}, got {outside.flatten()[0].item()}. "
                    "Start inside the domain, or choose another domain."
                )
            hyperparameter = tensor.as_subclass(cls)
        hyperparameter.domain = domain
        hyperparameter._assigned = tensor.clone()
        return hyperparameter

    def __repr__(self) -> str:  # type: ignore[override]
        """Show value and domain."""
        return f"Hyperparameter({self.tolist()}, {self.domain})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Hyperparameter":
        """Copy value and domain; the copy is not live."""
        if id(self) not in memo:
            memo[id(self)] = Hyperparameter(self.plain.clone(), self.domain)
            memo[id(self)].is_copy = True
        copied: Hyperparameter = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle value and domain."""
        return Hyperparameter, (self.item() if self.dim() == 0 else self.plain, self.domain)

    def assign(self, value: Tensor) -> None:
        """Give it another natural value ``[*H]``."""
        self.plain.copy_(value)
        self._assigned = self.plain.clone()

    def restore(self) -> None:
        """Take back the value last assigned.

        A torch scheduler writes the scheduled rate into a tensor that stands in a parameter group;
        the hyperparameter is the base of the schedule, not the rate of the day.
        """
        self.plain.copy_(self._assigned)

    def place(self, device: torch.device) -> None:
        """Let what is computed from it, while it is live, be computed on a device.

        A scalar stays where it is, to be read without waiting for the device, and acts by a twin
        there, since a derivative by a number of the host is fetched as soon as it is made.
        `torch.autograd.grad` by the hyperparameter is by both.

        Args:
            device: Where the weights are.
        """
        if self.dim() > 0:
            self.data = self.data.to(device)
            return
        there = place_of_doubles(device)
        self._twin, self._twin_value = None, self.item()
        if there != self.device:
            self._twin = self.plain.to(there).as_subclass(Number)
            self._twin.requires_grad_()

    @property
    def leaves(self) -> list[Tensor]:
        """Where graphs of what it acts in end: itself and, where it has one, its twin."""
        return [self] if self._twin is None else [self, self._twin]

    def make_live(self, is_live: bool) -> None:
        """Let what is computed from it have a graph, or none."""
        self.requires_grad_(is_live)
        if not is_live or self._twin is None:
            return
        value = self.item()
        if value != self._twin_value:
            self._twin_value = value
            with torch._C.DisableTorchFunctionSubclass():
                self._twin.detach().copy_(sent_to(self._twin.device, self.plain))

    @property
    def plain(self) -> Tensor:
        """The value as an ordinary tensor ``[*H]`` that shares memory and needs no gradient."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.detach()


# An optimizer's state_dict holds what stands in its groups, and checkpoints are read with
# `weights_only=True`.
_SAVED: list[Any] = [Hyperparameter, Number, Interval, NonNegative, Positive, Real]
torch.serialization.add_safe_globals(_SAVED)
# Loggers write a module's `hparams` for people to read, and for whoever reads them without us.
yaml.add_representer(Hyperparameter, lambda dumper, hyper: dumper.represent_data(hyper.tolist()))
