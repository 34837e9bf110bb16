"""Proofs that held, on disk, under a hash of all that they depend on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from foldcc.cache import code
from foldcc.codegen.source import directory, put
from foldcc.ir.pipeline import Stages
from foldcc.ir.program import Program
from foldcc.verification.proof import Proof


def recall(key: str) -> Proof | None:
    """A proof that held for the same programs, by the same code."""
    try:
        known = json.loads(_path(key).read_text())
    except (OSError, json.JSONDecodeError):  # never written, or not to be read: it is proved again
        return None
    held = {name: tuple(x) if isinstance(x, list) else x for name, x in known.items()}
    return Proof(**held)


def remember(key: str, proof: Proof) -> None:
    """Keeps a proof that holds. A directory that cannot be written keeps none, and programs are proved again."""
    assert proof.ok
    with suppress(OSError):
        put(_path(key), json.dumps({name: x for name, x in asdict(proof).items() if x is not None}))


def _path(key: str) -> Path:
    return directory() / "proofs" / f"{key}.json"


def fingerprint(stages: Stages, buffers: Mapping[str, Tensor], *how: Any) -> str:
    """A hash of every stage, the values of buffers, and the code that proves."""
    found = sha256(code())
    for line in (*map(str, how), *(line for stage in stages for line in _lines(stage.program))):
        found.update(line.encode() + b"\n")
    for name, x in (*sorted(buffers.items()), *stages["capture"].program.constants.items()):
        found.update(f"{name} {x.dtype} {tuple(x.shape)} {x.device.type}".encode())
        if x.device.type != "meta":
            found.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b"")
    return found.hexdigest()


def _lines(program: Program) -> Iterator[str]:
    yield f"{program.name} {program.mesh} {program.slots} {program.batch_dims} {program.literals} {program.wanted}"
    yield f"{program.updates} {sorted((f.name, n) for f, n in program.sizes.items())} {sorted(program.properties)}"
    for main in program.mains:
        for name, graph in (("main", main), *main.named_children()):
            yield name
            yield from (_told(node) for node in graph.graph.nodes) if isinstance(graph, fx.GraphModule) else ()


def _told(node: fx.Node) -> str:
    value, layout = node.meta.get("val"), node.meta.get("layout")
    of = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else ""
    return f"{node.name} {node.op} {node.target} {node.args} {node.kwargs} {of} {layout}"
