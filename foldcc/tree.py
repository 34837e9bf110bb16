"""The module tree of a folded model: the classes, names and attributes of the original, with parameters of its own.

The tree is what one reads and trains; a compiled program computes. What hooks observe, programs return (`foldcc/hooks.py`);
what forward would read anew, such as a switch, is refused by name instead of being ignored.
"""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import types
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.utils import _pytree as pytree

from foldcc.errors import FoldError, NotFolded
from foldcc.hooks import CALLED, OPTIONS, has_gradient_hook, hooks_of, is_the_models, named, refuse_unobserving
from foldcc.mesh import FoldedMesh

_ON_STATES = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
_HELD = ("_parameters", "_buffers", "_modules")


def refuse_hooks(model: nn.Module) -> None:
    """Raises for hooks that a folded model would not call: some of modules, and those of parameters' gradients."""
    for path, module, held, key, hook in _foreign(model):
        if path:
            refuse_unobserving(path, module, held, key, hook)
    for name, p in model.named_parameters():
        if has_gradient_hook(p):
            raise FoldError(
                f"Parameter {name} has a gradient hook, and the folded model's parameters are others.",
                valid=f"the hook on the folded model's own: folded.get_parameter({name!r})",
            )


def _foreign(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, int, Any]]:
    """The hooks that are no part of what the model computes."""
    own = {id(m) for m in model.modules()}
    for path, module in model.named_modules():
        for held, key, hook in hooks_of(module):
            if not is_the_models(hook, own):
                yield path, module, held, key, hook


@dataclass(frozen=True)
class Inherited:
    """A hook that was on the original; its handle removes it from there, and so from here."""

    theirs: dict[int, Any]
    ours: nn.Module
    held: str
    key: int


def inherit_hooks(model: nn.Module, root: nn.Module) -> list[Inherited]:
    """Gives the modules of a tree the hooks that were registered on the original's."""
    found = []
    for path, module, held, key, hook in _foreign(model):
        target = root.get_submodule(path)
        vars(target)[held][key] = hook
        for option in OPTIONS:
            if option.startswith(held) and key in vars(module)[option]:
                vars(target)[option][key] = True
        if held == "_backward_hooks":
            target._is_full_backward_hook = module._is_full_backward_hook
        found.append(Inherited(vars(module)[held], target, held, key))
    return found


def drop_removed(inherited: list[Inherited]) -> None:
    for hook in inherited:
        if hook.key not in hook.theirs:
            for held in (hook.held, *OPTIONS):
                vars(hook.ours)[held].pop(hook.key, None)


def copy_tree(model: nn.Module, root: nn.Module, mesh: FoldedMesh) -> None:
    """Gives `root` the tree of `model`: modules of the same classes, with copies of the parameters and buffers.

    What is shared stays shared: modules under two names, and tied parameters. On a real mesh parameters are DTensors from
    the start, replicated until a program says how they are laid out: a DTensor can become another one in place, an
    ordinary tensor cannot become a DTensor.
    """
    tensors: dict[int, Any] = {}
    modules: dict[int, nn.Module] = {id(model): root}

    def copied(x: Tensor) -> Tensor:
        x = x.detach().clone()
        return x if mesh.is_virtual or x.device.type == "meta" else x.to(mesh.device_type)

    def parameter(p: nn.Parameter) -> nn.Parameter:
        x = copied(p)
        if not mesh.is_virtual:
            side = mesh.of_tensors["attention"]
            x = DTensor.from_local(x, side, [Replicate()] * side.ndim, run_check=False)
        return nn.Parameter(x, requires_grad=p.requires_grad)

    def once(x: Any) -> Any:
        if x is not None and id(x) not in tensors:
            tensors[id(x)] = parameter(x) if isinstance(x, nn.Parameter) else copied(x)
        return None if x is None else tensors[id(x)]

    for module in model.modules():
        if module is not model:
            modules[id(module)] = _alike(module)
    for module in model.modules():
        target = modules[id(module)]
        target.training = module.training
        for name, x in module._parameters.items():
            target._parameters[name] = once(x)
        for name, b in module._buffers.items():
            target._buffers[name] = once(b)
        target._non_persistent_buffers_set |= module._non_persistent_buffers_set
        for name, child in module._modules.items():
            target._modules[name] = None if child is None else modules[id(child)]
        for held in _ON_STATES:
            for key, hook in vars(module)[held].items():
                vars(target)[held][key] = _rebound(hook, modules)


def outline(model: nn.Module) -> nn.Module:
    """The model with parameters on meta, to compile from when its weights are gone. What leads to no module is shared.

    The model itself where its weights are on meta already, and where something that it holds refers to its modules and
    cannot be copied with them, such as a function that closes over one.
    """
    parameters, own = list(model.parameters()), {id(m) for m in model.modules()}
    if all(p.is_meta for p in parameters):
        return model
    held = [x for m in model.modules() for x in pytree.tree_leaves([y for n, y in vars(m).items() if n not in CALLED])]
    leading = [x for x in held if not isinstance(x, (nn.Module, Tensor)) and _leads(x, own)]
    for x in leading:
        inner = x.func if isinstance(x, functools.partial) else x.__func__ if isinstance(x, types.MethodType) else x
        if inner is x or _leads(inner, own) and not isinstance(inner, types.MethodType):
            return model
    hooks = [hook for m in model.modules() for _, _, hook in hooks_of(m) if id(getattr(hook, "__self__", None)) not in own]
    kept = {id(x) for x in leading}
    memo: dict[int, Any] = {id(x): x for x in (*held, *hooks) if id(x) not in kept and not isinstance(x, nn.Module)}
    memo |= {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad) for p in parameters}
    return copy.deepcopy(model, memo)


def _leads(start: Any, own: set[int]) -> bool:
    """Whether an object refers to one of these, through whatever it holds; what functions see as globals is not held."""
    seen, left = {}, [start]
    while left:
        x = left.pop()
        if id(x) in own:
            return True
        if id(x) not in seen and not isinstance(x, (type, types.ModuleType, types.FrameType)):
            seen[id(x)] = x
            function = isinstance(x, types.FunctionType)
            left += [x.__closure__, x.__defaults__, x.__kwdefaults__] if function else gc.get_referents(x)
    return False


def _alike(module: nn.Module) -> nn.Module:
    """A module of the same class with the same plain attributes, without parameters, buffers, children and hooks."""
    new: nn.Module = object.__new__(type(module))
    vars(new).update(vars(module))
    for name in (*_HELD, *CALLED, *OPTIONS, *_ON_STATES):
        vars(new)[name] = type(vars(module)[name])()
    vars(new)["_non_persistent_buffers_set"] = set()
    return new


def _rebound(hook: Any, modules: dict[int, nn.Module]) -> Any:
    """A hook on state dicts that belongs to the copy of the module that it belonged to."""
    if isinstance(hook, types.MethodType) and id(hook.__self__) in modules:
        return types.MethodType(hook.__func__, modules[id(hook.__self__)])
    if getattr(hook, "with_module", False):
        new = object.__new__(type(hook))
        vars(new).update(vars(hook))
        new.hook = _rebound(hook.hook, modules)
        new.module = weakref.ref(modules[id(hook.module())])
        return new
    return hook


@contextmanager
def still_tied(root: nn.Module) -> Iterator[None]:
    """Parameters that are one inside a tree are one behind this context: moving them off meta makes one of each name."""
    names: dict[int, list[str]] = {}
    for name, p in root.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    yield
    for first, *others in names.values():
        for name in others:
            path, _, attribute = name.rpartition(".")
            root.get_submodule(path)._parameters[attribute] = root.get_parameter(first)


def unsaved_buffers(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that no state dict holds, such as rotary frequencies."""
    for path, module in root.named_modules(remove_duplicate=False):
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None:
                yield f"{path}.{name}" if path else name, buffer


class Attributes:
    """The public plain attributes of a tree's modules as they were, which the programs were compiled with."""

    def __init__(self, root: nn.Module):
        self._before = {path: _plain(module) for path, module in root.named_modules() if path}

    def check(self, root: nn.Module) -> None:
        """Raises for what was done to a submodule and would not change what the folded model computes."""
        for path, module in root.named_modules():
            if not path:
                continue
            for held, key, hook in hooks_of(module):
                refuse_unobserving(path, module, held, key, hook)
            before, now = self._before.get(path), _plain(module)
            if before is None or before.keys() != now.keys() or any(now[k] is not x for k, x in before.items()):
                changed = sorted(k for k in {*(before or ()), *now} if before is None or before.get(k) is not now.get(k))
                raise FoldError(
                    f"{named(path, module)} is not what it was when the model was folded: {', '.join(changed)}.",
                    valid="the change on the original model, before parallelize",
                )

    @staticmethod
    def refuse(model: nn.Module, name: str) -> None:
        """Raises if the original model has an attribute that is to be set on the folded one."""
        if hasattr(model, name):
            raise NotFolded(
                f"{name} is an attribute of {type(model).__name__}, whose forward may read it; programs would not.",
                valid="the change on the original model, before parallelize",
            )


def _plain(module: nn.Module) -> dict[str, Any]:
    return {name: x for name, x in vars(module).items() if name[0] != "_" and name != "training"}


@dataclass(frozen=True)
class State:
    """What a program is compiled for of a parameter."""

    trained: bool
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{'trained' if self.trained else 'frozen'}, {str(self.dtype).removeprefix('torch.')}"


class Elsewhere:
    """The parameters of a tree that other pipeline stages hold, by each of their names.

    Every rank compiles the whole model, so what is compiled for depends on them as well. What is done to parameters later, the
    ranks that hold them tell the others when a call begins.

    Attributes:
        counted: those that are here too, and that norms of all parameters count elsewhere.
        divided: whether some rank holds parameters that another one does not.
    """

    def __init__(self) -> None:
        self.names: dict[str, State] = {}
        self.counted: set[str] = set()
        self.divided = False
        self._known: dict[str, State] = {}  # of all parameters, as all ranks know it
        self._digests: tuple[int, ...] = ()  # of what each rank told when it was told last

    def leave(self, root: nn.Module, names: set[str]) -> None:
        """Takes parameters out of the tree, the first time that some are elsewhere."""
        held = self.own(root)
        for name in names & held.keys():
            path, _, attribute = name.rpartition(".")
            root.get_submodule(path)._parameters[attribute] = None
            self.names[name] = held[name]
        if not self.divided:
            self._known, self.divided = held, True

    def own(self, root: nn.Module) -> dict[str, State]:
        """Of the parameters that are here."""
        return {n: State(p.requires_grad, p.dtype) for n, p in root.named_parameters(remove_duplicate=False)}

    def to_tell(self, root: nn.Module) -> dict[str, State]:
        """What other ranks are to know; nothing where each of them holds all parameters."""
        return self.own(root) if self.divided else {}

    def is_news(self, digests: tuple[int, ...]) -> bool:
        """Whether some rank has told something else than before.

        Args:
            digests: of what each rank tells of its parameters now.
        """
        before, self._digests = self._digests, digests
        return self.divided and digests != before

    def hear(self, told: Sequence[Mapping[str, State]]) -> None:
        """Takes what each rank has told of its parameters.

        Raises:
            FoldError: two ranks that hold a parameter differ in it.
        """
        known: dict[str, tuple[int, State]] = {}
        for rank, theirs in enumerate(told):
            for name, state in theirs.items():
                first, other = known.setdefault(name, (rank, state))
                if other != state:
                    raise FoldError(
                        f"Ranks {first} and {rank} hold {name}, and have done different things to it.",
                        **{f"rank {first}": other, f"rank {rank}": state},
                        valid="requires_grad_ and casts on every rank that holds a parameter",
                    )
        self._known = {name: state for name, (_, state) in known.items()}
        self.names = {name: self._known[name] for name in self.names}

    def check(self, root: nn.Module) -> None:
        """Raises for what was done to parameters here, where ranks tell each other nothing."""
        for name, state in self.to_tell(root).items():
            if self._known[name] != state:
                raise FoldError(
                    f"Parameter {name} was frozen, unfrozen or cast, and other pipeline stages do not know of it.",
                    was=self._known[name],
                    now=state,
                    valid="parallelize(..., check_ranks=True); or the same on the model before parallelize",
                )

    @contextmanager
    def on_meta(self, root: nn.Module, original: nn.Module) -> Iterator[set[int]]:
        """A tree with parameters on meta in place of those that are elsewhere, inside this context. Gives their ids."""
        new: dict[int, nn.Parameter] = {}  # what is tied stays tied
        for name, state in self.names.items():
            path, _, attribute = name.rpartition(".")
            theirs = original.get_parameter(name)
            if id(theirs) not in new:
                like = torch.empty_like(theirs, dtype=state.dtype, device="meta", requires_grad=False)
                new[id(theirs)] = nn.Parameter(like, requires_grad=state.trained)
            root.get_submodule(path)._parameters[attribute] = new[id(theirs)]
        try:
            yield {id(p) for p in new.values()}
        finally:
            for name in self.names:
                path, _, attribute = name.rpartition(".")
                root.get_submodule(path)._parameters[attribute] = None


def elsewhere(tree: nn.Module) -> Elsewhere:
    """What other pipeline stages hold of a folded module."""
    found: Elsewhere = vars(tree)["_elsewhere"]
    return found


_READS = ("get_", "num_", "is_", "has_")  # how methods are called that only read


def of_the_original(model: nn.Module, folded: nn.Module, name: str) -> Any:
    """An attribute of the original model as the folded one has it.

    Plain attributes, and methods of the class, are the original's. Properties, and methods that are called like getters, are
    evaluated on the folded model, so that a device is that of its parameters, and embeddings are those that are trained.

    Raises:
        NotFolded: a method that may run or change the model that it belongs to.
    """
    if name in vars(model):
        return vars(model)[name]
    missing = object()
    found = inspect.getattr_static(type(model), name, missing)
    if found is missing:
        passed_on = getattr(model, name, missing)  # from what the model wraps, as an adapter does
        if passed_on is missing or callable(passed_on) or isinstance(passed_on, Tensor):
            raise AttributeError(f"{type(folded).__name__!r} object has no attribute {name!r}, nor has {type(model).__name__}")
        return passed_on
    if isinstance(found, property) and found.fget is not None:
        return found.fget(folded)
    if isinstance(found, functools.cached_property):
        return found.func(folded)
    if isinstance(found, type) or not hasattr(found, "__get__"):
        return found
    if isinstance(found, (classmethod, staticmethod)):
        return getattr(type(model), name)
    if isinstance(found, types.FunctionType) and name.startswith(_READS):
        return types.MethodType(found, folded)
    raise NotFolded(
        f"{name} is a method of {type(model).__name__}, and would run or change the original model instead of the folded one.",
        valid="before parallelize, on the original model, for what changes it;\n"
        "after original.load_state_dict(get_model_state_dict(folded, options=StateDictOptions(full_state_dict=True))),\n"
        "of torch.distributed.checkpoint.state_dict, for what runs it; save_pretrained of the folded model stores it",
    )
