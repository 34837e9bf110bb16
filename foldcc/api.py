"""The public entry: `parallelize`, and the checks of what a user gives."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from math import gcd
from numbers import Integral
from types import ModuleType, NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from foldcc.call import Call
from foldcc.capture import capture
from foldcc.capture.capacity import limit
from foldcc.capture.export import TRACERS
from foldcc.capture.transformers import example_inputs as own_example_inputs
from foldcc.capture.transformers import initialiser
from foldcc.errors import FoldError, divisors, listed, require
from foldcc.ir.node import argument
from foldcc.ir.plan import Plan
from foldcc.mesh import FoldedMesh
from foldcc.module import FoldedModule, called_like, quiet
from foldcc.ops.capacity import Capacity
from foldcc.ops.captured import captured_records
from foldcc.ops.experts import experts_node
from foldcc.passes import PIPELINE
from foldcc.passes.recompute import Recompute
from foldcc.precision import Precision
from foldcc.runtime.initial import initialise
from foldcc.runtime.schedule import Pipelining
from foldcc.varying import BATCH, SEQ
from foldcc.wrappers import refuse_wrapped

KERNELS = ("auto", "triton", "aten")
# Options of other tools, and what there is here.
_ELSEWHERE = {
    "fsdp": "zero=3 divides parameters, gradients and optimizer states over the ranks that replicate them",
    "capacity_factor": "foldcc.set_capacity(model, foldcc.Capacity(factor=1.25)) before, for it is a part of the model",
}


def parallelize(
    model: nn.Module,
    mesh: FoldedMesh | DeviceMesh | str,
    *,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    capture: str = "export",
    kernels: str | ModuleType = "auto",
    verify: bool | None = None,
    batch_dims: Mapping[str, int | None] | None = None,
    check_ranks: bool = True,
    plan: Plan | str | None = None,
    zero: int | None = None,
    ahead: int | None = None,
    attention: str | None = None,
    order: str | None = None,
    precision: Precision | None = None,
    recompute: str | float | None = None,
    micro_batches: int = 1,
    schedule: str = "gpipe",
    stages_per_rank: int = 1,
    dynamic: Collection[str] = (BATCH, SEQ),
    progress: Callable[[str], None] | None = None,
    cache: bool | None = None,
    **others: Any,
) -> FoldedModule:
    """The same model, running in parallel on a folded mesh.

    Args:
        model: any nn.Module, on `meta` or with weights; it is left as it is, and the parameters are copies. Its weights are
            freed when nothing else refers to it.
        mesh: from `init_folded_mesh`; or the text of a virtual one, such as `"dp=2,tp=2|ep=4"`; or a DeviceMesh with
            axes among pp, dp_replicate, dp, cp, tp, for which the MoE side is chosen.
        example_inputs: keyword arguments as a dict, or positional ones as a tuple; tensors give only their shape, dtype
            and device. On a virtual mesh they hold the global batch, else this rank's samples. With them the model is
            compiled now and takes no other structure of inputs. Without them the model's `dummy_inputs` serve, and any
            call with another structure compiles a program of its own.
        capture: "export" or "dynamo", the tracer.
        kernels: "triton" emits Triton kernels for what is between matrix products, and "aten" does not; "auto" does on
            CUDA. On CPU they run in Triton's interpreter, which is slow and for tests. Or kernels that were emitted and
            edited, from `load_kernels`.
        verify: every program that is compiled is proved equal to the captured one, as by `foldcc.verify`: in one round, on a
            mesh of fewer ranks where there are many, and on one rank for all. `model.proof` says what was proved, and what
            held is remembered on disk. False skips it; unless said otherwise, so does FOLDCC_VERIFY=0 in the environment.
        batch_dims: by the name of an argument, which of its dimensions is samples, or None if it has none. For what is
            not named it is the first, where that has the size of the others' samples.
        check_ranks: on real ranks, every call begins with an exchange of 24 bytes that finds ranks which call with other
            shapes or values, or with other samples where they share them, or raise, and every backward pass with one that finds
            ranks which go back from other outputs; the first call also compares replicas of weights and of state.
        plan: choices that are made already, as `model.plan` holds those of another compilation, or as its text. What it does
            not say is chosen at the least cost. It has to fit the first program; of a later one, for other inputs, it decides
            what it fits, and always the layouts of parameters.
        zero: 0 unless the plan says otherwise. 1 and 2 divide each parameter over the ranks that replicate it otherwise, and
            with it its gradient and what an optimizer holds of it: dense ones over `dp` and `cp`, experts over `edp`. It is
            gathered for the forward pass; its gradient leaves the backward pass of its block by a reduce-scatter. With 3 it is
            not kept for the backward pass, but gathered again. Where ranks do not divide a size, the last of them hold less.
            A plan says of single parameters over which axes they are divided.
        ahead: how many blocks before the one that uses them parameters are gathered, 0 unless the plan says otherwise. With
            1 a block's are gathered while the one before it computes, and its gradients are reduced while the next one does.
        attention: how `cp` divides attention: "gathered" keys and values, "ulysses" heads instead of the sequence, "ring" and
            "halo"; see docs/sequences.md. Unless said otherwise, what costs least for each layer.
        order: which positions a rank of `cp` has: "natural", one stretch, or "zigzag", a block from each end, so that causal
            attention is as much work for each of them. Unless said otherwise, what costs less.
        precision: the dtypes of products, of routers and of the sums of gradients, where they are others than the model's own;
            parameters, gradients and what an optimizer holds keep theirs. With it, calls are not made under autocast.
        recompute: what is computed again in the backward pass instead of being kept for it: "none", "selective" for what is
            made element by element, "blocks" for all but collectives and choices of experts, or the share of the bytes of
            activations that may be kept, such as 0.5. Unless said otherwise, it is "blocks" where the model's
            `gradient_checkpointing_enable()` was called, else what kernels compute as they read, else nothing.
        micro_batches: a call is cut into as many, along its samples, and its losses are those of all: see docs/pipelines.md.
        schedule: in which order pipeline stages work on micro-batches: "gpipe", all forward passes and then all backward
            passes; or "1f1b", in turns, which keeps less between them: the call then runs backward passes as well; or
            "zero-bubble", which makes gradients of parameters while a stage would wait; or "zbv" or "dualpipev", which do so
            with two stages on each rank, one down the ranks and one up again.
        stages_per_rank: pipeline stages that each place of `pp` has, every pp-th: with more of them, ranks wait less for each
            other, and send more.
        dynamic: which sizes of inputs may vary in a program: "batch", that of samples, and "seq", any other. From the second
            size on, one program is compiled for all that the mesh divides alike; what fits none is compiled for its shapes.
        progress: called with the name of each stage before it runs.
        cache: compiled programs are kept on disk, under a hash of all that decides them, and read when the same model is
            compiled again: see docs/models.md. False compiles anew; unless said otherwise, so does FOLDCC_PROGRAMS=0 in the
            environment.

    Raises:
        FoldError: the model, the mesh and the inputs do not fit together, with the arithmetic and the valid values; or
            a pass changed what the program computes: which, and where.
    """
    if not isinstance(model, nn.Module):
        raise FoldError(f"parallelize takes an nn.Module, not {type(model).__name__}.")
    if not isinstance(capture, str) or capture not in TRACERS:
        raise FoldError(f"There is no tracer {capture!r}.", valid=", ".join(TRACERS))
    if kernels not in KERNELS if isinstance(kernels, str) else not isinstance(kernels, ModuleType):
        raise FoldError(f"There are no kernels {kernels!r}.", valid=f"{', '.join(KERNELS)}, or what load_kernels returns")
    for name in others:
        raise FoldError(f"parallelize takes no option {name!r}.", instead=_ELSEWHERE.get(name), valid=", ".join(_OPTIONS))
    if any(isinstance(m, FoldedModule) for m in model.modules()):
        raise FoldError(
            f"{type(model).__name__} is folded already, or has a folded module inside.",
            valid="the original model; a module around a folded one is trained as it is",
        )
    refuse_wrapped(model)
    _check_parameters(model)
    _check_kinds(mesh, example_inputs, batch_dims, attention, order, progress)
    for name, switch in (("verify", verify), ("check_ranks", check_ranks), ("cache", cache)):
        require(name, switch, (bool, NoneType), "True or False")
    if isinstance(mesh, str):
        mesh = FoldedMesh.parse(mesh)
    if isinstance(mesh, DeviceMesh):
        mesh = _chosen_mesh(mesh, model, example_inputs, capture)
    pipelining = Pipelining(mesh.size("pp"), micro_batches, schedule, stages_per_rank)
    _check_stages(mesh, example_inputs is not None or own_example_inputs(model) is not None)
    given = Plan.parse(plan) if isinstance(plan, str) else Plan() if plan is None else plan
    if not isinstance(given, Plan):
        raise FoldError(f"plan is a foldcc.Plan or its text, not {type(given).__name__}.")
    if zero is not None and (type(zero) is not int or zero not in (0, 1, 2, 3)):
        raise FoldError(f"zero={zero!r} is no stage of ZeRO.", valid="0, 1, 2, 3")
    if ahead is not None and (type(ahead) is not int or ahead < 0):
        raise FoldError(f"ahead={ahead!r} is no number of blocks.", valid="0 or more")
    if zero not in (None, given.zero) and (given.stored or given.kept):
        raise FoldError(
            f"The plan's choices are those for zero={given.zero}, and zero={zero} is asked for.",
            valid="one of both; or the plan without its parts stored and kept",
        )
    _check_attention(attention, given, mesh)
    _check_order(order, attention or given.attention, given, mesh)
    if precision is not None and not isinstance(precision, Precision):
        raise FoldError(f"precision is a foldcc.Precision, not {precision!r}.", valid="Precision(compute='bfloat16')")
    if None not in (precision, given.precision) and precision != given.precision:
        raise FoldError(
            f"The plan's choices are those for {given.precision}, and {precision} is asked for.", valid="one of both"
        )
    if recompute is not None and given.kept:
        raise FoldError("The plan says what is kept, and recompute= would choose it.", valid="one of both")
    folded = called_like(type(model))(
        model,
        mesh,
        tracer=capture,
        kernels=kernels,
        pipeline=PIPELINE,
        verified=os.environ.get("FOLDCC_VERIFY") != "0" if verify is None else verify,
        progress=progress or quiet,
        batch_dims=batch_dims,
        check_ranks=check_ranks,
        plan=replace(
            given,
            zero=given.zero if zero is None else zero,
            ahead=given.ahead if ahead is None else ahead,
            attention=attention or given.attention,
            order=order or given.order,
            precision=precision or given.precision,
        ),
        recompute=None if recompute is None else Recompute(policy=recompute).policy,
        pipelining=pipelining if pipelining.stages * micro_batches > 1 else None,
        dynamic=_dynamic(dynamic),
        cache=os.environ.get("FOLDCC_PROGRAMS") != "0" if cache is None else cache,
    )
    fixed = example_inputs is not None
    inputs = example_inputs if fixed else _dummy(model, mesh, micro_batches)
    if inputs is not None:
        args, kwargs = _arguments(inputs)
        folded._compile(_call(model, args, kwargs), fixed=fixed)
    return folded


def _check_kinds(mesh: Any, inputs: Any, batch_dims: Any, attention: Any, order: Any, progress: Any) -> None:
    require("mesh", mesh, (FoldedMesh, DeviceMesh, str), "a FoldedMesh, a DeviceMesh, or text such as 'dp=2,tp=2|ep=4'")
    require("example_inputs", inputs, (Mapping, tuple, list, NoneType), "a dict of arguments by name, or a tuple of them")
    require("batch_dims", batch_dims, (Mapping, NoneType), "a dict from names of arguments to their dimension of samples")
    for name, dim in (batch_dims or {}).items():
        require(f"batch_dims[{name!r}]", dim, (Integral, NoneType), "a dimension, or None")
    require("attention", attention, (str, NoneType), "the name of a way to divide a sequence")
    require("order", order, (str, NoneType), "the name of an order of a sequence")
    require("progress", progress, (Callable, NoneType), "a function that is given the name of a stage")  # type: ignore[arg-type]


def _call(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    try:
        return Call.of(model, args, kwargs)
    except TypeError as error:  # as Python says it of a call
        takes = inspect.signature(model.forward)
        raise FoldError(f"example_inputs are no arguments of the model's forward: {error}.", forward=takes) from None


def _dynamic(asked: Collection[str]) -> tuple[str, ...]:
    if isinstance(asked, str) or not isinstance(asked, Collection) or any(x not in (BATCH, SEQ) for x in asked):
        raise FoldError(f"dynamic={asked!r} is no tuple of sizes that may vary.", valid=f"{(BATCH, SEQ)}, ({SEQ!r},), ()")
    return tuple(asked)


def _check_attention(asked: str | None, given: Plan, mesh: FoldedMesh) -> None:
    ways = dict.fromkeys(d.way for record in captured_records() for d in record.divisions if d.way)
    for way in (asked, given.attention):
        if way and way not in ways:
            raise FoldError(f"attention={way!r} is no way to divide a sequence.", valid=listed(ways))
        if way and mesh.size("cp") == 1:
            raise FoldError(
                f"attention={way!r} says how cp divides the sequence, and cp=1.", mesh=str(mesh), valid="a mesh with cp"
            )
    if asked not in (None, given.attention) and (given.attention or given.blocks):
        raise FoldError(
            f"The plan says how attention runs, and attention={asked!r} is asked for.",
            valid="one of both; or the plan without attention= and without its blocks",
        )


def _check_order(asked: str | None, attention: str, given: Plan, mesh: FoldedMesh) -> None:
    if asked not in (None, "zigzag", "natural"):
        raise FoldError(f"order={asked!r} is no order of a sequence.", valid="zigzag, natural")
    order = asked or given.order
    if order and mesh.size("cp") == 1:
        raise FoldError(
            f"order={order!r} says which positions a rank of cp has, and cp=1.", mesh=str(mesh), valid="a mesh with cp"
        )
    ways = dict.fromkeys(d.way for record in captured_records() for d in record.divisions if d.zigzag)
    if order == "zigzag" and attention and attention not in ways:
        raise FoldError(f"attention={attention!r} is not for order='zigzag'.", valid=f"{listed(ways)}; or order='natural'")
    if asked not in (None, given.order) and (given.order or given.blocks):
        raise FoldError(
            f"The plan says which positions ranks have, and order={asked!r} is asked for.",
            valid="one of both; or the plan without order= and without its blocks",
        )


def _arguments(given: Mapping[str, Any] | tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((), dict(given)) if isinstance(given, Mapping) else (tuple(given), {})


def _check_parameters(model: nn.Module) -> None:
    parameters = dict(model.named_parameters())
    if not parameters:
        raise FoldError(f"{type(model).__name__} has no parameters, so there is nothing to lay out.")
    for name, p in parameters.items():
        if isinstance(p, DTensor):
            raise FoldError(
                f"Parameter {name} is a DTensor on {p.device_mesh}, so the model is parallel already.",
                valid="the model before any fully_shard, parallelize_module or distribute_tensor",
            )


def _dummy(model: nn.Module, mesh: FoldedMesh, micro_batches: int = 1) -> dict[str, Any] | None:
    """The model's own dummy inputs, grown to a batch and a sequence that every mesh axis divides."""
    found = own_example_inputs(model)
    if found is None:
        return None
    batch = 2 * micro_batches * mesh.passed
    length = 8 * mesh.size("tp") * mesh.size("cp")
    return {
        name: torch.zeros((batch, length)[: x.dim()] + tuple(x.shape[2:]), dtype=x.dtype) if isinstance(x, Tensor) else x
        for name, x in found.items()
    }


def _check_stages(mesh: FoldedMesh, examples: bool) -> None:
    if mesh.size("pp") > 1 and not mesh.is_virtual and not examples:
        raise FoldError(
            f"Which of pp={mesh.size('pp')} stages holds a parameter is decided by the first program, and there is none.",
            mesh=str(mesh),
            valid="example_inputs",
        )


def _chosen_mesh(
    mesh: DeviceMesh, model: nn.Module, given: Mapping[str, Any] | tuple[Any, ...] | None, tracer: str
) -> FoldedMesh:
    """The MoE side for a plain DeviceMesh: `ep` is as many ranks of a stage as divide the experts of every layer."""
    plain = FoldedMesh.from_device_mesh(mesh)
    given = _dummy(model, plain) if given is None else given
    if given is None:
        raise FoldError(
            "How many experts the model has is read off its graph, which needs inputs.",
            mesh=str(plain),
            valid="example_inputs, or a mesh from init_folded_mesh, which says how the experts are laid out",
        )
    device = next(model.parameters()).device
    args, kwargs = pytree.tree_map_only(Tensor, lambda x: torch.zeros_like(x, device=device), _arguments(given))
    program = capture(model, args, kwargs, plain, device=device, tracer=tracer)
    nodes = program.graph.graph.find_nodes(op="call_function", target=experts_node)
    counts = [argument(node, "w_up").meta["val"].shape[0] for node in nodes]
    stage = plain.world_size // plain.size("pp")
    shared = gcd(*counts) if counts else 1
    return FoldedMesh.from_device_mesh(mesh, ep=max(d for d in divisors(stage) if shared % d == 0))


def init_parameters(model: FoldedModule, seed: int) -> None:
    """Gives every parameter of a folded model its initial values, which are the same on every fold, bit for bit.

    Modules initialise themselves: by `_init_weights` of a Transformers model, else by their `reset_parameters`. What they draw
    depends on the seed, on the parameter's name and on where an element stands; each rank draws for the part that it holds.
    So a model may be built on meta, folded, allocated by `to_empty` and initialised, and no rank holds a whole parameter that
    it would not keep. The numbers are not those that PyTorch's generators give.

    Raises:
        FoldError: a parameter is on meta, is initialised in a way that is no function of its positions, or by nothing.
    """
    require("model", model, FoldedModule, "a folded one, from parallelize")
    require("seed", seed, Integral, "a whole number")
    on_meta = [name for name, p in model.named_parameters() if p.is_meta]
    if on_meta:
        raise FoldError(f"{on_meta[0]} is on meta.", parameters=listed(on_meta), valid='folded.to_empty(device="cpu") before')
    original, layouts = model._compiler.model, model._places.layouts
    with model._elsewhere.on_meta(model, original) as elsewhere:  # modules initialise all of their parameters
        initialise(model, original, initialiser(original), layouts, model.mesh.stage, seed, elsewhere)


def set_capacity(model: nn.Module, capacity: Capacity | None) -> None:
    """Gives the experts of a Transformers model a capacity, in place, before `parallelize`.

    From then on it is a part of what the model computes, in one process as on every fold, and copies of the model have it:
    choices beyond it are dropped. Experts of your own take it as an argument, `foldcc.ops.experts(..., capacity=)`.

    Args:
        capacity: in place of one that there is; None for experts that take every token.

    Raises:
        FoldError: the model has no such experts, or is folded already.
    """
    require("model", model, nn.Module, "an nn.Module")
    if isinstance(model, FoldedModule):
        raise FoldError("The model is folded, and its programs are made.", valid="set_capacity on the model before parallelize")
    if not isinstance(capacity, Capacity | None):
        raise FoldError(f"capacity is a foldcc.Capacity, not {capacity!r}.", valid="Capacity(factor=1.25)")
    if not limit(model, capacity):
        raise FoldError(f"{type(model).__name__} has no experts of Transformers.", valid="foldcc.ops.experts(..., capacity=)")


_OPTIONS = [p.name for p in inspect.signature(parallelize).parameters.values() if p.kind is p.KEYWORD_ONLY]

__all__ = ["FoldedModule", "init_parameters", "parallelize", "set_capacity"]
