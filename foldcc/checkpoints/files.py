"""Files of safetensors: one, or several with an index. Tensors are read by the slice, and written where they belong."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from foldcc.checkpoints.pieces import Piece, leaf
from foldcc.errors import FoldError, listed

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"


@contextmanager
def opened(folder: Path) -> Iterator[dict[str, Piece]]:
    """Every tensor of a checkpoint by name, unread.

    Raises:
        FoldError: there is none, a file is missing or cut off, or its weights are quantised.
    """
    from safetensors import SafetensorError, safe_open

    with ExitStack() as stack:
        found: dict[str, Piece] = {}
        for path in _paths(folder):
            try:
                with safe_open(path, framework="pt"):  # which looks at every entry, and at the length
                    pass
                file = stack.enter_context(path.open("rb", buffering=0))
            except (SafetensorError, OSError) as error:
                raise FoldError(
                    f"{path.name} is missing, cut off or no file of safetensors.", folder=folder, error=error
                ) from error
            length = int.from_bytes(file.read(8), "little")
            for name, entry in json.loads(file.read(length)).items():
                if name != "__metadata__":
                    found[name] = _unread(file.fileno(), name, entry, 8 + length)
        yield found


def _paths(folder: Path) -> list[Path]:
    config = folder / "config.json"
    how = json.loads(config.read_text()).get("quantization_config") if config.exists() else None
    if how:
        raise FoldError(
            f"The weights are quantised ({how.get('quant_method')}), and programs multiply with weights as they are.",
            folder=folder,
            valid="the checkpoint before it was quantised; or one that Transformers dequantised and saved",
        )
    index = folder / INDEX
    if index.exists():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if not (folder / SINGLE).exists():
        there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else None
        raise FoldError(
            f"There is no {SINGLE} and no {INDEX}.",
            folder=folder,
            there="no folder" if there is None else listed(there) or "nothing",
            valid="a folder that save_pretrained wrote, or huggingface_hub.snapshot_download(name)",
        )
    return [folder / SINGLE]


def _unread(file: int, name: str, entry: dict[str, Any], begin: int) -> Piece:
    """A tensor of a file. Of a slice, what lies together is read at once, and nothing between."""
    shape, dtype = entry["shape"], _dtype(entry["dtype"])
    begin += entry["data_offsets"][0]

    def fetch(at: tuple[slice, ...]) -> Tensor:
        out = torch.empty([s.stop - s.start for s in at], dtype=dtype)
        cuts = [d for d, s in enumerate(at) if s.stop - s.start < shape[d]]
        outer = cuts[-1] if cuts else 0  # the dimensions before it are walked
        step = prod(shape[outer:])
        first = at[outer].start * prod(shape[outer + 1 :]) if cuts else 0
        rows = out.view(prod(out.shape[:outer]), -1).view(torch.uint8) if out.numel() else out.view(0, 0)
        for row, place in zip(rows, product(*(range(s.start, s.stop) for s in at[:outer])), strict=True):
            number = 0
            for d, i in enumerate(place):
                number = number * shape[d] + i
            _get(file, begin + (number * step + first) * dtype.itemsize, row.numpy().data)
        return out

    return leaf(shape, dtype, (name, dtype), fetch)


def _get(file: int, at: int, into: memoryview) -> None:
    while into:
        count = os.preadv(file, [into], at)
        if not count:
            raise FoldError(f"A file ends at byte {at}, and was longer when it was opened.")
        at, into = at + count, into[count:]


@cache
def _dtype(name: str) -> torch.dtype:
    """The dtype that a file calls by a name, as the library says."""
    from safetensors.torch import load

    text = json.dumps({"x": {"dtype": name, "shape": [0], "data_offsets": [0, 0]}}).encode()
    return load(len(text).to_bytes(8, "little") + text)["x"].dtype


def header(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """What a file begins with, and at which byte of it each tensor begins."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    first, starts = 0, {}
    for name, x in tensors.items():
        last = first + x.numel() * x.element_size()
        entries[name] = {"dtype": _dtype_name(x.dtype), "shape": list(x.shape), "data_offsets": [first, last]}
        starts[name], first = first, last
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = len(text).to_bytes(8, "little") + text
    return begin, {name: len(begin) + start for name, start in starts.items()}


@cache
def _dtype_name(dtype: torch.dtype) -> str:
    from safetensors.torch import save

    text = save({"x": torch.empty(0, dtype=dtype)})
    name: str = json.loads(text[8 : 8 + int.from_bytes(text[:8], "little")])["x"]["dtype"]
    return name


class Writer:
    """A file of safetensors, tensor by tensor in any order.

    Attributes:
        failed: what the system said when something could not be written; nothing is written any more. The caller has to
            go on gathering with the other ranks, and raises it later.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]):
        self.failed: OSError | None = None
        self._begin, self._starts = header(tensors)
        self._file: BinaryIO | None = None
        self._path = path

    def write(self, name: str, x: Tensor) -> None:
        try:
            if self._file is None and self.failed is None:
                self._file = self._path.open("wb", buffering=0)
                _put(self._file, 0, self._begin)
            if self._file is not None:
                _put(self._file, self._starts[name], x.contiguous().view(-1).view(torch.uint8).numpy().data)
        except OSError as error:
            self.failed = error
            self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _put(file: BinaryIO, at: int, content: Any) -> None:
    file.seek(at)
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]


def split(tensors: Mapping[str, Tensor], most: int) -> list[dict[str, Tensor]]:
    """Tensors in as many files as it takes that none is larger than `most` bytes, unless a tensor is."""
    files: list[dict[str, Tensor]] = []
    left = 0
    for name, x in tensors.items():
        size = x.numel() * x.element_size()
        if not files or size > left:
            files.append({})
            left = most
        files[-1][name] = x
        left -= size
    return files


def number_of_bytes(size: int | str) -> int:
    """A size as Transformers takes it: bytes, or text such as `"200MB"`."""
    if isinstance(size, int):
        return size
    found = re.fullmatch(r"(\d+) *([KMGT]?)(i?)B", size.strip(), re.IGNORECASE)
    if found is None:
        raise FoldError(f"{size!r} is no size.", valid='bytes, or text such as "200MB" and "5GiB"')
    return int(found[1]) * (1024 if found[3] else 1000) ** "_KMGT".index(found[2].upper() or "_")


def index_of(files: Mapping[str, Sequence[str]], size: int) -> str:
    """The index of several files, as text."""
    names = {name: file for file, tensors in files.items() for name in tensors}
    return json.dumps({"metadata": {"total_size": size}, "weight_map": names}, indent=2, sort_keys=True) + "\n"
