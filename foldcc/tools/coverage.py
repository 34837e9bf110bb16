"""Coverage: which causal language models of the installed Transformers fold, equal and proved, made small by one rule.

python -m foldcc coverage --dense                         # all types without experts
python -m foldcc coverage --types llama,mixtral --mesh 'dp=2,tp=2|ep=4'
python -m foldcc coverage --out docs/coverage.md          # all of them, and the page
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

from rich.console import Console

from foldcc.errors import FoldError, listed
from foldcc.mesh import FoldedMesh
from foldcc.tables import table
from foldcc.tools.small import holds_experts
from foldcc.tools.trial import TOLERANCE, Outcome, meshes_of, trial

_HEAD = ["type", "mesh", "captured", "folded", "equal", "proved", "all ranks / model", "seconds", "replicated", "reason"]


def main(arguments: Sequence[str]) -> int:
    """`python -m foldcc coverage`: 0 if all that run are folded, equal and proved; 1 if not; 2 for bad options."""
    parser = argparse.ArgumentParser(prog="python -m foldcc coverage", description="Folds every causal language model type.")
    parser.add_argument("--types", default="", help="of Transformers, with commas between; all by default")
    parser.add_argument("--dense", action="store_true", help="types without experts")
    parser.add_argument("--experts", action="store_true", help="types with experts")
    parser.add_argument("--mesh", action="append", help="instead of dp=2,tp=2, and dp=2,tp=2|ep=4 and tp=2|ep=2 with experts")
    parser.add_argument("--out", type=Path, help="the page to write, such as docs/coverage.md")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at once")
    parser.add_argument("--seconds", type=float, default=600.0, help="that a model may take")
    parser.add_argument("--memory", type=float, default=4.0, help="GiB that a model may take")
    options = parser.parse_args(arguments)
    try:
        chosen = _chosen(options.types, dense=options.dense, experts=options.experts)
        meshes = [str(FoldedMesh.parse(text)) for text in options.mesh or ()]
        if options.out is not None and not os.access(options.out if options.out.exists() else options.out.parent, os.W_OK):
            raise FoldError(f"The page cannot be written to {options.out}.", valid="--out, with a file that can be written")
    except FoldError as error:
        print(f"python -m foldcc coverage: {error}", file=sys.stderr)
        return 2
    jobs = [(kind, mesh) for kind, holds in chosen.items() for mesh in meshes or meshes_of(holds)]
    console, found = Console(), []
    for outcome in outcomes(jobs, at_once=options.jobs, seconds=options.seconds, memory=options.memory):
        found.append(outcome)
        console.print(f"{len(found):>4}/{len(jobs)} ", "  ".join(_cells(outcome)), highlight=False, soft_wrap=True)
    found.sort(key=lambda outcome: (outcome.kind, jobs.index((outcome.kind, outcome.mesh))))
    print(table(_HEAD, map(_cells, (x for x in found if x.runs))))
    print(totals(found, chosen))
    if options.out is not None:
        options.out.write_text(page(found, chosen))
    return int(not all(outcome.good for outcome in found if outcome.runs))


def types() -> list[str]:
    """The causal language models of the installed Transformers.

    Raises:
        FoldError: it is not installed.
    """
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    except ImportError as error:
        raise FoldError("Transformers is not installed.", valid="pip install 'foldcc[hf]'") from error
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _chosen(names: str, *, dense: bool, experts: bool) -> dict[str, bool]:
    """The types that are asked for, and whether they hold experts."""
    known = types()
    asked = [name for name in names.split(",") if name] or known
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise FoldError(f"Transformers has no causal language model {listed(unknown)}.", valid=listed(known))
    both = dense == experts
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {kind: holds for kind in asked for holds in [type_holds_experts(kind)] if both or holds == experts}


def type_holds_experts(kind: str) -> bool:
    from transformers import CONFIG_MAPPING, logging

    logging.set_verbosity_error()
    try:
        return holds_experts(CONFIG_MAPPING[kind]())
    except Exception:  # a configuration without defaults; the trial tells
        return False


def outcomes(
    jobs: Sequence[tuple[str, str]], *, at_once: int, seconds: float, memory: float, run: Callable[[str, str], Outcome] = trial
) -> Iterator[Outcome]:
    """The outcome of each type on its mesh as it comes, each in a process with a limit of seconds and of GiB."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["foldcc.tools.trial", "transformers.modeling_utils", "torch.export"])
    with ThreadPoolExecutor(at_once) as pool:
        waiting = [pool.submit(_apart, context, run, kind, mesh, seconds, memory) for kind, mesh in jobs]
        for done in as_completed(waiting):
            yield done.result()


def _apart(
    context: multiprocessing.context.ForkServerContext,
    run: Callable[[str, str], Outcome],
    kind: str,
    mesh: str,
    seconds: float,
    memory: float,
) -> Outcome:
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, run, kind, mesh, memory))
    start = time.perf_counter()
    process.start()
    theirs.close()
    died = Outcome(kind=kind, mesh=mesh, reached="run")
    try:
        if ours.poll(seconds):
            found: Outcome = ours.recv()
            return found
        return replace(died, reason=f"It took more than {seconds:g} s.", seconds=time.perf_counter() - start)
    except EOFError:
        process.join()
        return replace(died, reason=f"The process died with exit code {process.exitcode}.")
    finally:
        process.kill()
        process.join()


def _work(out: Connection, run: Callable[[str, str], Outcome], kind: str, mesh: str, memory: float) -> None:
    import torch
    from transformers import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    there = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (there + int(memory * 2**30),) * 2)
    out.send(run(kind, mesh))


def _cells(x: Outcome) -> list[str]:
    ratio = "" if x.ratio is None else f"{x.ratio:.2f}"
    equal = "" if x.error is None else f"{x.error:.0e}" if x.equal else f"NO, {x.error:.0e}"
    reason = x.reason if x.proved or not x.proof else " ".join([x.reason, x.proof])
    marks = ["yes" if x.captured else "no", "yes" if x.folded else "no", equal, "yes" if x.proved else "no" if x.proof else ""]
    return [x.kind, x.mesh, *marks, ratio, f"{x.seconds:.1f}", ", ".join(x.replicated), reason]


def totals(found: Sequence[Outcome], experts: dict[str, bool]) -> str:
    """How many types fold, by mesh."""
    lines = []
    for holds, mesh in dict.fromkeys((experts[x.kind], x.mesh) for x in found):
        of = [x for x in found if x.runs and (experts[x.kind], x.mesh) == (holds, mesh)]
        counts = {what: sum(getattr(x, what) for x in of) for what in ("captured", "folded", "equal", "proved", "good")}
        which = "with experts" if holds else "dense"
        numbers = ", ".join(f"{n} {what}" for what, n in counts.items() if what != "good")
        share = f" ({counts['good'] / len(of):.0%} folded, equal and proved)" if of else ""
        lines.append(f"{len(of)} types {which} on `{mesh}`: {numbers}{share}")
    return "\n".join(lines)


def page(found: Sequence[Outcome], experts: dict[str, bool]) -> str:
    """docs/coverage.md."""
    import torch
    import transformers

    versions = f"Transformers {transformers.__version__}, PyTorch {torch.__version__.partition('+')[0]}"
    parts = [
        "# Coverage",
        textwrap.fill(
            f"Written by `make coverage` ({versions}): every type of `AutoModelForCausalLM`, its configuration made small by "
            "one rule (`foldcc/tools/small.py`), folded on a virtual mesh in a process of its own. *equal*: the largest "
            "relative error of the loss, any output and any gradient against the module itself in float64, which passes up to "
            f"{TOLERANCE:g}. *all ranks / model*: FLOPs. *seconds*: of one core, for `parallelize` and its proof. "
            "*replicated*: operators that run whole on ranks, for want of a rule.",
            width=128,
        ),
        "",
        "\n".join(f"- {line}" for line in totals(found, experts).splitlines()),
    ]
    for holds, title in ((True, "Types with experts"), (False, "Dense types")):
        rows = [_cells(x) for x in found if x.runs and experts[x.kind] == holds]
        if rows:
            parts += [f"\n## {title}\n", _markdown(_HEAD, rows)]
    why = Counter(x.reason or x.proof for x in found if x.runs and not x.good)
    if why:
        parts += ["\n## Why not\n", _markdown(["types", "reason"], [[str(n), text] for text, n in why.most_common()])]
    rest = {x.kind: x.reason for x in found if not x.runs}
    if rest:
        parts += ["\n## Types that do not run in one process when made small\n", _markdown(["type", "reason"], rest.items())]
    return "\n".join(parts) + "\n"


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
