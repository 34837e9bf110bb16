"""Capturing with `torch.export`: its non-strict tracer, or Dynamo, torch.compile's front end."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch._dynamo.exc
import torch._dynamo.variables.base
import torch.fx.experimental.symbolic_shapes
from torch import fx, nn
from torch.export.graph_signature import InputKind, TensorArgument
from torch.fx._lazy_graph_module import _LazyGraphModule, _use_lazy_graph_module
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

from foldcc.capture import backwards, functions, masks, modules, normalize, pairs, random, regions, transformers
from foldcc.capture.functional import functional
from foldcc.capture.observe import Recorder, observing, remove_hooks
from foldcc.capture.unchanged import unchanged
from foldcc.capture.updates import return_updates
from foldcc.capture.varying import Varying
from foldcc.errors import FoldError
from foldcc.hooks import told
from foldcc.ir.program import Program, Slot
from foldcc.mesh import FoldedMesh

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
# How torch.export says that a value of the graph was made outside of it.
_UNSEEN = re.compile(r"fake tensor in the exported program constant's list.*attribute: (\S*?)\.?lifted_tensor", re.DOTALL)
TRACERS = ("export", "dynamo")
# What the tracers raise when the graph would depend on the values in a tensor. Dynamo raises some of it for all that it
# cannot trace.
_DATA_DEPENDENT = (
    torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode,
    torch._dynamo.exc.UserError,
    torch._dynamo.exc.Unsupported,
    torch._dynamo.exc.TorchRuntimeError,
    torch._subclasses.fake_tensor.DataDependentOutputException,
    torch._subclasses.fake_tensor.DynamicOutputShapeException,
)
# Of a module that is registered nowhere, Dynamo's exporter does not know the parameters; and Dynamo of PyTorch 2.11 takes a
# module that a function is given for what it cannot be, a constant.
_RAISED_BY_DYNAMO = (*_DATA_DEPENDENT, KeyError, torch._dynamo.variables.base.AsPythonConstantNotImplementedError)


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    mesh: FoldedMesh,
    *,
    device: torch.device,
    tracer: str = "export",
    recorder: Recorder | None = None,
    varying: Varying | None = None,
) -> Program:
    """Traces `model(*args, **kwargs)` into a Program over global shapes. The model is left as it was.

    Args:
        model: any module; a `torch.fx.GraphModule` is one.
        args, kwargs: example inputs with global shapes; tensors give only their shape, dtype and device.
        mesh: the mesh that the program is for.
        device: where the program will run; the model may be on `meta`.
        tracer: "export" for torch.export's non-strict tracer, "dynamo" for Dynamo.
        recorder: for the modules that hooks watch, whose marks the program returns last.
        varying: sizes of inputs that are symbols while the model is traced.

    Raises:
        FoldError: the model's graph depends on the values in a tensor, or it changes what is no buffer of it.
    """
    if tracer not in TRACERS:
        raise FoldError(f"There is no tracer {tracer!r}.", valid=", ".join(TRACERS))
    if tracer == "dynamo" and recorder is not None and recorder.watches:
        raise FoldError(
            f"Dynamo does not see hooks, and there are some{told(recorder.watches)}.",
            valid='capture="export"; or the model without these hooks',
        )
    for path, leaf in pytree.tree_leaves_with_path((args, dict(kwargs))):
        if not isinstance(leaf, (torch.Tensor, bool, int, float, str, type(None))):
            raise FoldError(
                f"Input {pytree.keystr(path[1:])} is a {type(leaf).__name__}, which no program takes.",
                valid="tensors, numbers, strings and None, in tuples, lists and dicts",
            )
    args, kwargs = as_exported(model, args, kwargs)
    with ExitStack() as stack:
        stack.enter_context(unchanged(model))
        remove_hooks(model)
        modules.adapt(model)
        stack.enter_context(transformers.adapted(model, kwargs))
        stack.enter_context(functions.adapted(model, tracer))
        stack.enter_context(observing(model, recorder or Recorder()))
        exported = _exported(model, args, dict(kwargs), tracer, varying)
    sources = _sources(exported)
    _untie(model, exported)
    exported = functional(exported)
    for node in exported.graph.nodes:
        _keep_source(node, sources)
    regions.refuse_unknown(exported.graph_module)
    graph = _LazyGraphModule(nn.Module(), _renamed(exported.graph))
    slots = _slots(model, exported, graph, args, kwargs)
    _drop_constants(graph, slots)
    marks = len(recorder.marks) if recorder is not None else 0
    updated = return_updates(graph, exported.graph_signature.output_specs, slots, marks)
    _put_on(graph, device)
    masks.remove_marks(graph.graph, {s.name for s in slots if s.kind == "input"})
    backwards.transpose(graph.graph)
    pairs.in_pairs(graph.graph, {s.name for s in slots if s.kind in ("buffer", "constant")})
    normalize.normalize(graph)
    slots = random.with_keys(graph, slots)
    literals = _without_literals(graph)
    out_spec = exported.call_spec.out_spec
    out_spec = out_spec.child(0) if recorder is not None and recorder.watches else out_spec
    first = out_spec.num_leaves - len(literals)
    return Program(
        graph=graph,
        slots=slots,
        out_spec=out_spec,
        literals=literals,
        updates={first + i: name for i, name in enumerate(updated)},
        constants={s.name: _constant(model, exported.constants[s.names[0]], device) for s in slots if s.kind == "constant"},
        mesh=mesh,
        properties=frozenset({"captured"}),
        name=type(model).__name__,
    )


def _constant(model: nn.Module, value: torch.Tensor, device: torch.device) -> torch.Tensor:
    if value.is_meta and device.type != "meta":
        raise FoldError(
            f"The forward of {type(model).__name__} uses a tensor of shape {list(value.shape)} that is no buffer, is on meta "
            "and so has no values.",
            valid="a buffer (register_buffer), which can be given values later; or a model that is not built on meta",
        )
    return (torch.view_as_real(value) if value.is_complex() else value).to(device)


def as_exported(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The `.module()` of an exported program takes by position what it was exported with by position."""
    codegen = model.graph._codegen if isinstance(model, fx.GraphModule) else None
    if args or not isinstance(codegen, _PyTreeCodeGen):
        return args, kwargs
    count = codegen.pytree_info.in_spec.child(0).num_children
    first = list(inspect.signature(model.forward).parameters)[:count]
    return tuple(kwargs[name] for name in first), {name: x for name, x in kwargs.items() if name not in first}


def _exported(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tracer: str, varying: Varying | None = None
) -> torch.export.ExportedProgram:
    raised: tuple[type[Exception], ...] = _RAISED_BY_DYNAMO if tracer == "dynamo" else _DATA_DEPENDENT
    try:
        with _use_lazy_graph_module(tracer == "export"):  # nothing runs its graphs, so their Python need not be written
            dims = varying.dims(kwargs) if varying is not None else None
            exported = torch.export.export(model, args, kwargs, strict=tracer == "dynamo", dynamic_shapes=dims)
    except raised as error:
        if tracer == "dynamo":
            # Dynamo says that something was raised, not what. The other tracer runs the same code and raises it itself.
            with functions.adapted(model, "export"):
                _exported(model, args, kwargs, "export")
            raise FoldError(
                f"Dynamo cannot trace the forward of {type(model).__name__}: {_first_line(error)}",
                at=_user_frame(error),
                valid='capture="export", whose tracer can',
            ) from error
        raise FoldError(
            f"The forward of {type(model).__name__} depends on the values in a tensor, so it cannot be captured: "
            f"{_first_line(error)}",
            at=_user_frame(error),
            valid=regions.STATIC,
        ) from error
    except RuntimeError as error:
        unseen = _UNSEEN.search(str(error))
        if unseen is None:
            raise
        raise FoldError(
            f"The forward of {type(model).__name__} makes a value that no tracer sees: it writes into the data of a parameter, "
            "or of another tensor that it holds.",
            at=unseen[1] or None,
            valid="a forward that leaves parameters as they are; what changes them, such as a clamp, after optimizer.step()",
        ) from error
    if varying is not None:
        varying.written(exported, kwargs)
    return exported


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _user_frame(error: Exception) -> str | None:
    """The last line of the model's own code that the error went through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename and f.filename != __file__]
    return f"{frames[-1].filename}:{frames[-1].lineno} {frames[-1].line}" if frames else None


def _sources(exported: torch.export.ExportedProgram) -> dict[str, str]:
    """File and line of the model's own code for each node, before decomposition replaces them by its own."""
    found = {}
    for node in (n for part in regions.parts(exported.graph_module) for n in part.graph.nodes):
        frames = [f for f in _FRAME.findall(node.meta.get("stack_trace") or "") if "/torch/" not in f[0]]
        if frames:
            path, line = frames[-1]
            node.meta["source"] = found[node.name] = f"{path.rpartition('/')[2]}:{line}"
    return found


def _keep_source(node: fx.Node, sources: Mapping[str, str]) -> None:
    """`node.meta["source"]`, such as `modeling_mixtral.py:118`, through the chain of nodes that the node came from."""
    origin = [] if "source" in node.meta else list(node.meta.get("from_node", ()))
    while origin:
        step = origin.pop()
        if step.name in sources:
            node.meta["source"] = sources[step.name]
            return
        origin += step.from_node


def _renamed(exported: fx.Graph) -> fx.Graph:
    """The graph with names that every later copy keeps; exported placeholders may be called `input`, like a builtin."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(exported, {}))
    return graph


def _slots(
    model: nn.Module,
    exported: torch.export.ExportedProgram,
    graph: fx.GraphModule,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> tuple[Slot, ...]:
    names: dict[int, list[str]] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        names.setdefault(id(tensor), []).append(name)
    held = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    paths = [pytree.keystr(path[1:]) for path, _ in pytree.tree_leaves_with_path((args, dict(kwargs)))]
    inputs = iter(paths)
    slots = []
    placeholders = graph.graph.find_nodes(op="placeholder")
    for spec, node in zip(exported.graph_signature.input_specs, placeholders, strict=True):
        name = node.name
        if spec.kind == InputKind.PARAMETER:
            slots.append(Slot(name, "parameter", tuple(names[id(held[spec.target])]), grad=True))
        elif spec.kind == InputKind.BUFFER:
            slots.append(Slot(name, "buffer", tuple(names[id(held[spec.target])])))
        elif spec.kind == InputKind.CONSTANT_TENSOR:
            slots.append(Slot(name, "constant", (str(spec.target),)))
        else:
            path = next(inputs)
            if isinstance(spec.arg, TensorArgument):
                slots.append(Slot(name, "input", (path,)))
    return tuple(slots)


def _untie(model: nn.Module, exported: torch.export.ExportedProgram) -> None:
    """A tensor that the module tree holds under several names is one placeholder, so that it has one layout and one value."""
    held = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    first: dict[int, fx.Node] = {}
    left = []
    placeholders = exported.graph.find_nodes(op="placeholder")
    for spec, node in zip(exported.graph_signature.input_specs, list(placeholders), strict=True):
        there = held.get(spec.target) if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) else None
        if there is None or first.setdefault(id(there), node) is node:
            left.append(spec)
        else:
            node.replace_all_uses_with(first[id(there)])
            exported.graph.erase_node(node)
    exported.graph_signature.input_specs[:] = left


def _drop_constants(graph: fx.GraphModule, slots: tuple[Slot, ...]) -> None:
    """Inputs that are no tensors are part of the program, not placeholders of it."""
    known = {slot.name for slot in slots}
    for node in list(graph.graph.find_nodes(op="placeholder")):
        if node.name not in known:
            graph.graph.erase_node(node)


def _without_literals(graph: fx.GraphModule) -> dict[int, Any]:
    """Takes outputs that are no tensors, such as None, out of the graph; returns them by their position."""
    (output,) = graph.graph.find_nodes(op="output")
    literals = {i: x for i, x in enumerate(output.args[0]) if not isinstance(x, fx.Node)}
    output.args = (tuple(x for x in output.args[0] if isinstance(x, fx.Node)),)
    return literals


def _put_on(graph: fx.GraphModule, device: torch.device) -> None:
    """A model built on `meta` is traced there; its program runs on a device."""
    for node in graph.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": device}
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map_only(torch.Tensor, lambda v: _moved(v, device), node.meta["val"])


def _moved(value: Any, device: torch.device) -> Any:
    if value.device.type == device.type:
        return value
    with value.fake_mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
