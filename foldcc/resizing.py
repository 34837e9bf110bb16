"""The program of a call without compiling it alone: that of all calls that differ from it in sizes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import gcd

from torch import nn

from foldcc.call import Call, without_sizes
from foldcc.capture.varying import Varying
from foldcc.compiler import Compiler
from foldcc.ir.resize import Between, Unlike, named_alike
from foldcc.passes import Stages, check_types, run_passes
from foldcc.passes.average import Average
from foldcc.programs import Kept, Programs
from foldcc.runtime.agreement import alike
from foldcc.runtime.modes import compiling
from foldcc.varying import BATCH, Varied, marked, named, parts, shapes_of, sizes_of

_TRIES = 4  # programs for all sizes of calls that are alike otherwise, such as one for odd sizes, or for one sample a rank


def resized(compiler: Compiler, programs: Programs, call: Call, tree: nn.Module) -> Kept | None:
    """The program of a call, where one was compiled for all that differ from it in sizes alone, or is now; else it is said why.

    Collective over the world: there is one on all ranks, or on none.
    """
    part, modes = compiler.micro_batches(call)[0], compiler.modes(tree)
    earlier = programs.alike(lambda free: part.key(tree, modes, free)) if compiler.dynamic else None
    if earlier is None:
        return None
    made, why = _made(compiler, programs, call, tree, earlier)
    if not compiler.whole.is_virtual and not alike(compiler.whole, str(made is None)):
        made, why = None, "another rank has none"
    if made is None:
        programs.announce_sizes(why)
    return made


def _made(compiler: Compiler, programs: Programs, call: Call, tree: nn.Module, earlier: Kept) -> tuple[Kept | None, str]:
    """The program, or None and why."""
    key, why = without_sizes(earlier.key), ""
    known = programs.varied.setdefault(key, [])
    for varied in known:
        try:
            return _at(compiler, call, tree, earlier, varied), ""
        except Unlike as error:
            why = str(error)
    if programs.tried[key] == _TRIES:
        return None, why
    programs.tried[key] += 1
    try:
        known.append(_varied(compiler, call, tree, earlier))
        return _at(compiler, call, tree, earlier, known[-1]), ""
    except Unlike as error:
        return None, why or str(error)


def _varied(compiler: Compiler, whole: Call, tree: nn.Module, earlier: Kept) -> Varied:
    """The program for all calls that differ from one for which there is one in sizes alone; compiled for large ones.

    Raises:
        Unlike: there is none, and why.
    """
    call = compiler.micro_batches(whole)[0]
    batch_dims = compiler.sample_dims(call)
    shapes, ranks = shapes_of(call, compiler.mesh, batch_dims), compiler.mesh.data_parallel
    names = named(earlier.shapes, shapes, batch_dims, ranks, compiler.dynamic)
    sizes = sizes_of(names, earlier.shapes)
    shared = {name: parts(compiler.mesh, name) for name in sizes}
    evenly = all(n % shared[name] == 0 for name, n in sizes.items())
    for most in [shared] if evenly else [shared, dict.fromkeys(sizes, 2 * compiler.mesh.world_size)]:
        steps = {name: gcd(n, most[name]) for name, n in sizes.items()}
        odd = {} if evenly else {name: (step, most[name]) for name, step in steps.items()}
        try:
            return _compiled(compiler, whole, tree, earlier, Varying(names, marked(sizes, steps)), odd)
        except Unlike as error:
            why = error
        except Exception as error:  # whatever a model, a tracer or a pass raises for symbols and large sizes, it is said
            why = Unlike(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
    raise why


def _compiled(
    compiler: Compiler, whole: Call, tree: nn.Module, earlier: Kept, varying: Varying, odd: Mapping[str, tuple[int, int]]
) -> Varied:
    call, stages = compiler.micro_batches(whole)[0], earlier.stages.lowered
    compiler.progress("capture")
    program, _ = compiler.captured(call, tree, compiler.sample_dims(call), varying)
    program = named_alike(program, stages[0].program)
    passes = [s.by for s in stages if s.by is not None]
    if any(isinstance(p, Average) and p.whole is not None for p in passes):
        assert compiler.pipelining is not None
        count = compiler.pipelining.micro_batches
        marks = {name: n * (count if name == BATCH else 1) for name, n in varying.marked.items()}
        beside, _ = compiler.captured(whole, tree, compiler.sample_dims(whole), Varying(varying.names, marks))
        passes = [replace(p, whole=beside) if isinstance(p, Average) else p for p in passes]
    plan = stages[-1].program.plan.without_sizes()
    with compiling():
        made = compiler.run(replace(program, plan=plan), passes, check=check_types, progress=compiler.progress)
    sizes = {name: n for name, n in sizes_of(varying.names, earlier.shapes).items() if name in varying.marked}
    varying.granted.check(sizes)
    between = Between(stages, made, sizes, varying.marked)
    between.check()
    odd = {name: x for name, x in odd.items() if name in varying.marked}
    return Varied(varying.names, varying.granted, between, earlier.shapes, compiler.mesh.data_parallel, odd)


def _at(compiler: Compiler, call: Call, tree: nn.Module, earlier: Kept, varied: Varied) -> Kept:
    """The program of such a call.

    Raises:
        Unlike: that one is not for it.
    """
    part = compiler.micro_batches(call)[0]
    stages = varied.at(shapes_of(part, compiler.mesh, compiler.sample_dims(part)))
    emission, _ = compiler.emission(tree)
    if emission:
        with compiling():
            stages = Stages([*stages, *list(run_passes(stages[-1].program, emission, check=check_types))[1:]])
    return replace(
        earlier,
        key=part.key(tree, compiler.modes(tree), earlier.free),
        executable=compiler.executable(stages[-1].program),
        stages=stages,
        told=part.told(earlier.free),
        resized=True,
        others={},
    )
