"""Kernels of the grouped products, run by Triton's interpreter, against the same program in float64.

Errors are relative to the result's norm, so that no scale hides a wrong one, and everything that a kernel leaves unwritten
is NaN.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import foldcc
from foldcc.codegen import source, tiles
from foldcc.codegen.experts import find
from foldcc.codegen.regions import Region, is_free
from foldcc.mesh import FoldedMesh
from foldcc.ops.experts import expert_of_row, grouped_linear, grouped_outer, permute
from tests.models import WITH_AUX_LOSS, tiny_model, token_batch

aten = torch.ops.aten
few = settings(max_examples=2, deadline=None, derandomize=True)
MORE = ([0, 1, 0], [97], [16, 32, 16])
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-4}  # of float16, the result's own rounding is 2e-4


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with mock.patch.dict(os.environ, FOLDCC_CACHE=str(tmp_path_factory.mktemp("kernels"))):
        yield


# --- programs: (function, its inputs by shape; counts, order and rows by name) ---


def _act(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * up


def _plain(x: Tensor, w: Tensor, counts: Tensor) -> Any:
    return grouped_linear(x, w, counts, False)


def _turned(x: Tensor, w: Tensor, counts: Tensor) -> Any:
    return grouped_linear(x, w, counts, True)


def _gated(x: Tensor, w: Tensor, counts: Tensor) -> Any:
    h = grouped_linear(x, w, counts, False)
    gate, up = h.split(h.shape[1] // 2, -1)
    return h, _act(gate, up)


def _gathered(x: Tensor, order: Tensor, w: Tensor, counts: Tensor) -> Any:
    gate, up = grouped_linear(permute(x, order, 2), w, counts, True).chunk(2, -1)
    return _act(gate, up)


def _clamped(x: Tensor, w: Tensor, b: Tensor, counts: Tensor) -> Any:
    h = grouped_linear(x, w, counts, True) + b[expert_of_row(x, counts)]
    gate, up = h[:, ::2].clamp(max=1.0), h[:, 1::2].clamp(-1.0, 1.0)
    return h, (up + 1) * (gate * torch.sigmoid(gate * 1.7))


def _down(x: Tensor, w: Tensor, b: Tensor, counts: Tensor) -> Any:
    return grouped_linear(x, w, counts, False) + torch.index_select(b, 0, expert_of_row(x, counts))


def _gated_backward(grad: Tensor, w: Tensor, h: Tensor, counts: Tensor) -> Any:
    rows = grouped_linear(grad, w, counts, True)
    gate, up = h.split(h.shape[1] // 2, -1)
    return torch.cat([aten.silu_backward(rows * up, gate), rows * torch.nn.functional.silu(gate)], 1)


def _clamped_backward(grad: Tensor, w: Tensor, h: Tensor, counts: Tensor) -> Any:
    rows = grouped_linear(grad, w, counts, False)
    gate, up = h[:, ::2], h[:, 1::2]
    grad_up = torch.where((up >= -1) & (up <= 1), rows * gate, 0.0)
    grad_gate = torch.where(gate <= 1, rows * up, 0.0)
    placed = [aten.slice_backward(g, h.shape, 1, i, 2**63 - 1, 2) for i, g in ((1, grad_up), (0, grad_gate))]
    return placed[0] + placed[1]


def _weighed(x: Tensor, order: Tensor, w: Tensor, h: Tensor, s: Tensor, counts: Tensor) -> Any:
    rows = grouped_linear(permute(x, order, 2), w, counts, True)
    gate, up = h.split(h.shape[1] // 2, -1)
    y = _act(gate, up)
    return (rows * y).sum(1, keepdim=True), y * s, rows * s


def _outer(x: Tensor, h: Tensor, counts: Tensor) -> Any:
    return grouped_outer(x, h, counts, False)


def _outer_turned(x: Tensor, order: Tensor, h: Tensor, counts: Tensor) -> Any:
    return grouped_outer(permute(x, order, 2), h, counts, True)


PROGRAMS: dict[str, Callable[..., Any]] = {
    "plain": _plain,
    "turned": _turned,
    "gated": _gated,
    "gathered": _gathered,
    "clamped": _clamped,
    "down": _down,
    "gated_backward": _gated_backward,
    "clamped_backward": _clamped_backward,
    "weighed": _weighed,
    "outer": _outer,
    "outer_turned": _outer_turned,
}
_TURNED = ("turned", "gathered", "clamped", "gated_backward", "weighed")
_NARROW = ("gated_backward", "clamped_backward", "weighed", "plain", "turned", "down")


def inputs_of(name: str, counts: Sequence[int], k: int, i: int, dtype: torch.dtype, strided: bool = False) -> list[Tensor]:
    """Random inputs of a program: `k` is what its product sums over, `2 * i` or `i` are its columns."""
    random = torch.Generator().manual_seed(sum(counts) + 7 * k + i)
    rows, experts = sum(counts), len(counts)
    columns = i if name in _NARROW else 2 * i
    copied = name in ("gathered", "weighed", "outer_turned")
    shapes = {
        "x": ((rows + 1) // 2 if copied else rows, k),
        "grad": (rows, k),
        "w": (experts, k, columns) if name in _TURNED else (experts, columns, k),
        "b": (experts, columns),
        "h": (rows, 2 * i),
        "s": (rows, 1),
    }
    found = []
    code = PROGRAMS[name].__code__
    for argument in code.co_varnames[: code.co_argcount]:
        if argument == "counts":
            found.append(torch.tensor(counts))
        elif argument == "order":
            found.append(torch.randperm(rows, generator=random))
        else:
            shape = [n * (1 + strided) for n in shapes[argument]]
            value = torch.randn(shape, generator=random, dtype=torch.float32).to(dtype)
            found.append(value[tuple(slice(None, None, 2) for _ in shape)] if strided else value)
    return found


# --- running ---


def traced(function: Callable[..., Any], inputs: Sequence[Tensor]) -> fx.Graph:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        graph = make_fx(function, tracing_mode="fake")(*(mode.from_tensor(x) for x in inputs)).graph
    return graph


def poisoned(*shape: Any, **options: Any) -> Tensor:
    found = torch.zeros(*shape, **options)
    return found.fill_(float("nan") if found.is_floating_point() else 1)


def load(text: str) -> ModuleType:
    return source.load(source.write("experts", f"{source.HEAD}\n\n{text}\n"))


def outputs_of(graph: fx.Graph, regions: Sequence[Region], texts: Sequence[str], inputs: Sequence[Any]) -> list[Tensor]:
    """What a graph returns, its regions computed by their kernels, which are called `kernel`."""
    known: dict[fx.Node, Any] = dict(zip((n for n in graph.nodes if n.op == "placeholder"), inputs, strict=True))
    owner = {n: i for i, r in enumerate(regions) for n in r.outputs}

    def value(n: fx.Node) -> Any:
        if n not in known and n in owner:
            r = regions[owner[n]]
            with mock.patch.object(torch, "empty", poisoned):
                made = load(texts[owner[n]]).kernel(*(value(x) for x in r.inputs))
            known.update(zip(r.outputs, listed(made), strict=True))
        elif n not in known:
            arguments = fx.node.map_arg((n.args, n.kwargs), value)
            known[n] = n.target(*arguments[0], **arguments[1])  # type: ignore[operator]
        return known[n]

    output = next(n for n in graph.nodes if n.op == "output")
    return [value(n) for n in output.all_input_nodes]


def listed(x: Any) -> Sequence[Tensor]:
    return x if isinstance(x, tuple) else (x,)


def widened(x: Any) -> Any:
    return x.double() if torch.is_tensor(x) and x.is_floating_point() else x


def error(found: Tensor, right: Tensor) -> float:
    """Norm of the difference over norm of the result; infinite where it is no number."""
    assert found.shape == right.shape
    difference = torch.linalg.vector_norm(found.double() - right.double())
    if right.numel() == 0 or (difference == 0 and torch.equal(found.double(), right.double())):
        return 0.0
    found_error = float(difference / torch.linalg.vector_norm(right.double()))
    return found_error if found_error == found_error else float("inf")


def check(name: str, inputs: Sequence[Tensor], change: Callable[[str], str] = lambda text: text) -> list[Region]:
    """Holds the kernels of a program, their text changed, against the program in float64."""
    graph = traced(PROGRAMS[name], inputs)
    regions = find(graph, set())
    texts = [change(r.source("kernel")) for r in regions]
    dtype = inputs[0].dtype
    right = listed(PROGRAMS[name](*map(widened, inputs)))
    for found, expected in zip(outputs_of(graph, regions, texts, inputs), right, strict=True):
        assert found.dtype == dtype
        assert error(found, expected) <= TOLERANCE[dtype], (name, error(found, expected))
    return regions


# --- kernels ---

COUNTS = st.lists(st.one_of(st.just(0), st.just(1), st.integers(2, 40)), min_size=1, max_size=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", PROGRAMS)
@few
@given(counts=COUNTS, k=st.integers(1, 50), i=st.integers(1, 40), strided=st.booleans())
def test_a_kernel_computes_what_its_program_says(
    name: str, dtype: torch.dtype, counts: list[int], k: int, i: int, strided: bool
) -> None:
    check(name, inputs_of(name, counts, k, i, dtype, strided))


@pytest.mark.parametrize("counts", [[1], [0, 0, 33], [0, 0], *(pytest.param(c, marks=pytest.mark.slow) for c in MORE)], ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_tokens_may_be_few_or_all_of_one_expert(name: str, counts: list[int]) -> None:
    check(name, inputs_of(name, counts, 24, 20, torch.float32))


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_of_one_product_is_one_kernel(name: str) -> None:
    (region,) = check(name, inputs_of(name, [5, 9], 24, 20, torch.float32))
    computed = {n for n in region.inputs[0].graph.nodes if n.op == "call_function" and not is_free(n)}
    others = {n for n in computed if n not in region.nodes}
    assert {str(n.target) for n in others} <= {"foldcc.expert_of_row.default"}


def test_an_expert_without_rows_has_a_gradient_of_zero() -> None:
    inputs = inputs_of("outer", [0, 7], 8, 8, torch.float32)
    graph = traced(_outer, inputs)
    (region,) = find(graph, set())
    (found,) = outputs_of(graph, [region], [region.source("kernel")], inputs)
    assert not found[0].any() and found[1].any()


def test_float64_accumulates_in_float64() -> None:
    inputs = list(map(widened, inputs_of("gated", [5, 18], 40, 20, torch.float32)))
    with mock.patch.dict(TOLERANCE, {torch.float64: 1e-14}):
        check("gated", inputs)


@given(counts=COUNTS, height=st.sampled_from([1, 16, 32]))
@settings(max_examples=50, deadline=None)
def test_tiles_cover_each_row_once(counts: list[int], height: int) -> None:
    inputs = inputs_of("plain", [3], 4, 4, torch.float32)
    (region,) = find(traced(_plain, inputs), set())
    table = load(region.source("kernel")).kernel_tiles(torch.tensor(counts), sum(counts), height, "cpu")
    found = [(e, r) for e, a, b in table.T.tolist() for r in range(a, min(b, a + height))]
    assert sorted(found) == list(enumerate_rows(counts))


def enumerate_rows(counts: Sequence[int]) -> list[tuple[int, int]]:
    experts = [e for e, n in enumerate(counts) for _ in range(n)]
    return [(e, r) for r, e in enumerate(experts)]


# --- mistakes that must be found ---

MISTAKES = {
    "nothing is accumulated": ("gated", "acc0 = tl.dot(left, w_tile, acc0", "acc0 = tl.dot(left * 0, w_tile, acc0"),
    "gate and up are swapped": ("gated", "tl.exp(-acc0)", "tl.exp(-acc1)"),
    "even and odd columns are swapped": ("clamped", "acc0, acc1 = tl.split", "acc1, acc0 = tl.split"),
    "the last tile is dropped": ("gated", "n_tiles = tile_table.shape[1]", "n_tiles = tile_table.shape[1] - 1"),
    "the last step is dropped": ("plain", "range(0, 576, BK)", "range(0, 576 - BK, BK)"),
    "the next expert's weights": ("plain", "expert = tl.load(tile_table + tile)", "expert = tl.load(tile_table + tile) ^ 1"),
    "rows are not put in order": ("gathered", "(order_1 // 2)", "(r // 2)"),
    "float16 accumulators": ("plain", "w_tile, acc0", "w_tile, acc0.to(tl.float16).to(tl.float32)"),
    "bias of another expert": ("clamped", "b_1_ptr + expert *", "b_1_ptr + (1 - expert) *"),
    "halves are swapped": ("gated_backward", "r * 40 + (c + 20)", "r * 40 + c"),
    "sums of one tile only": ("weighed", ".sum(0)[:, None]", "[0][:, None]"),
    "padding is summed": ("weighed", "tl.where(r_ok & c_ok, mul_1, 0)", "mul_1 + 1"),
    "the gradient takes the next expert's rows": ("outer", "stop = tl.load(row_ends + expert)", "stop = tl.load(row_ends + 1)"),
    "the gradient starts too late": ("outer", "for r0 in range(first,", "for r0 in range(first + BK,"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_a_wrong_kernel_is_caught(mistake: str, dtype: torch.dtype) -> None:
    name, right, wrong = MISTAKES[mistake]

    def change(text: str) -> str:
        assert right in text, text
        return text.replace(right, wrong)

    inputs = inputs_of(name, [40, 33], 576 if name == "plain" else 72, 20, dtype)
    check(name, inputs)
    with pytest.raises(AssertionError):
        check(name, inputs, change)


# --- finding them ---


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def program(request: pytest.FixtureRequest) -> Any:
    family = request.param
    model = tiny_model(family, aux_loss=family in WITH_AUX_LOSS)
    return foldcc.parallelize(model, FoldedMesh.parse("dp=2,tp=2|ep=4"), example_inputs=token_batch(4)).program


def regions_of(module: fx.GraphModule) -> list[Region]:
    return [r for block in module.children() for r in find(block.graph, set())]  # type: ignore[arg-type]


def layers(module: fx.GraphModule) -> int:
    return sum(str(n.target) == "foldcc.unpermute.default" for block in module.children() for n in block.graph.nodes)


def test_all_products_of_a_layer_are_found(program: Any) -> None:
    n = layers(program.graph)
    forward, backward = regions_of(program.graph), regions_of(program.backward)
    assert [r.kind for r in forward] == ["grouped_linear"] * 2 * n
    assert [r.kind for r in backward] == ["grouped_linear", "grouped_outer"] * 2 * n


def test_an_activation_and_its_gradient_are_computed_with_the_product_before_them(program: Any) -> None:
    for r in [*regions_of(program.graph)[::2], *regions_of(program.backward)[::4]]:
        products = [n for n in r.nodes if str(n.target) == "foldcc.grouped_linear.default"]
        assert len(products) == 1
        assert any(u.target is torch.ops.foldcc.grouped_linear.default for n in r.outputs for u in n.users)


def test_rows_that_only_products_read_are_put_in_order_by_them(program: Any) -> None:
    regions = [*regions_of(program.graph), *regions_of(program.backward)]
    inside = {n for r in regions for n in r.nodes if str(n.target) == "foldcc.permute.default"}
    for block in [*program.graph.children(), *program.backward.children()]:
        for n in block.graph.find_nodes(op="call_function", target=torch.ops.foldcc.permute.default):
            products = all(str(u.target).startswith("foldcc.grouped_") for u in n.users)
            assert (n in inside) == products
    assert not any(n in inside for r in regions for n in r.outputs)


@pytest.mark.parametrize("counts", [[3, 0], [0, 0], [17, 40]], ids=str)
def test_kernels_of_a_model_compute_what_its_graph_says(program: Any, counts: list[int]) -> None:
    for r in [*regions_of(program.graph), *regions_of(program.backward)]:
        inputs = [_value(n, counts) for n in r.inputs]
        with mock.patch.object(torch, "empty", poisoned):
            made = load(r.source("kernel")).kernel(*inputs)
        right = _evaluated(r.outputs, dict(zip(r.inputs, map(widened, inputs), strict=True)))
        for n, found, expected in zip(r.outputs, listed(made), right, strict=True):
            assert error(found, expected) <= TOLERANCE[torch.float32], n


def _evaluated(nodes: Sequence[fx.Node], known: dict[fx.Node, Any]) -> list[Any]:
    """Values of nodes, given those of some that they are made of."""

    def value(n: fx.Node) -> Any:
        if n not in known:
            kwargs = {k: v for k, v in n.kwargs.items() if k != "dtype"}
            known[n] = n.target(*fx.node.map_arg(n.args, value), **fx.node.map_arg(kwargs, value))  # type: ignore[operator]
        return known[n]

    return list(map(value, nodes))


def _value(n: fx.Node, counts: list[int]) -> Any:
    """A value for an input of a region: a size that data decide is the number of rows."""
    value, rows, random = n.meta["val"], sum(counts), torch.Generator().manual_seed(len(n.name))
    if not isinstance(value, Tensor):
        return rows
    shape = [rows if isinstance(s, torch.SymInt) else s for s in value.shape]
    if value.is_floating_point():
        return torch.randn(shape, generator=random)
    if "expert_of_row" in n.name:
        return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return torch.tensor(counts) if shape == [len(counts)] else torch.randperm(rows, generator=random)


def test_claimed_nodes_are_left_alone() -> None:
    graph = traced(_gated, inputs_of("gated", [3], 8, 8, torch.float32))
    (product,) = graph.find_nodes(op="call_function", target=torch.ops.foldcc.grouped_linear.default)
    (silu,) = graph.find_nodes(op="call_function", target=aten.silu.default)
    assert find(graph, {product}) == []
    (region,) = find(graph, {silu})
    assert silu not in region.nodes and region.outputs == (product,)


def test_two_products_that_read_each_other_run_one_after_the_other() -> None:
    def crossed(x: Tensor, w: Tensor, v: Tensor, counts: Tensor) -> Any:
        h, g = grouped_linear(x, w, counts, False), grouped_linear(x, v, counts, False)
        q = g * 2
        return h * q, g * h, q

    inputs = [torch.randn(7, 8), torch.randn(2, 16, 8), torch.randn(2, 16, 8), torch.tensor([3, 4])]
    graph = traced(crossed, inputs)
    regions = find(graph, set())
    assert len(regions) == 2
    found = outputs_of(graph, regions, [r.source("kernel") for r in regions], inputs)
    right = crossed(*map(widened, inputs))
    assert all(error(a, b) <= TOLERANCE[torch.float32] for a, b in zip(found, right, strict=True))


# --- tiles ---


def test_steps_in_flight_fit_into_shared_memory() -> None:
    limit = {"sm_90": 232_448, "sm_100": 232_448, "other": 101_376, "interpreter": 101_376}
    for (chip, element, name), tile in tiles.table().tiles.items():
        assert tile.shared(element) <= limit[chip], (chip, element, name)


_COMPILE = """
import ast, importlib.util, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

for path, types, (rows, columns, step, warps, stages) in ast.literal_eval(sys.argv[1]):
    spec = importlib.util.spec_from_file_location("kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernel = module.kernel_kernel
    types |= {"BM": rows, "BN": columns, "BK": step}
    constants = {a: t for a, t in types.items() if isinstance(t, int)}
    signature = {a: "constexpr" if a in constants else types.get(a, "i32") for a in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names) if a not in constants and a != "n_tiles"}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})
    ptx = made.asm["ptx"]
    print([ptx.count("wgmma.mma_async"), ptx.count("cp.async.cg.shared.global"), made.metadata.shared])
"""


def test_kernels_compile_for_hopper_with_its_matrix_units_and_loads_ahead() -> None:
    jobs = []
    for name in ("gated", "gathered", "clamped", "gated_backward", "outer"):
        inputs = inputs_of(name, [512] * 2, 512, 512, torch.float16)
        with mock.patch.object(tiles, "chip", lambda: "sm_90"):
            (region,) = find(traced(PROGRAMS[name], inputs), set())
            text = region.source("kernel")
        types: dict[str, Any] = {"tile_table": "*i64", "row_ends": "*i64"}
        for n in (*region.inputs, *region.outputs):
            kind = "*i64" if n.meta["val"].dtype == torch.int64 else "*fp16"
            types |= {f"{n.name}_ptr": kind, f"{n.name}_out": kind, f"{n.name}_s{n.meta['val'].dim() - 1}": 1}
        shape = ast.literal_eval(text.split("warps, stages = ")[1].split(")")[0] + ")")
        arguments = text.split("def kernel_kernel(")[1].split(")")[0]
        used = {a: t for a, t in types.items() if f"{a}," in f"{arguments},"}
        jobs.append((str(source.write("ahead", f"{source.HEAD}\n\n{text}\n")), used, shape))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", _COMPILE, repr(jobs)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    made = [ast.literal_eval(line) for line in run.stdout.splitlines()]
    assert len(made) == len(jobs)
    assert all(units > 0 and ahead > 0 and shared <= 232_448 for units, ahead, shared in made), made
