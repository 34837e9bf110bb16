"""Kernels: the emitted program computes what the program before it computes, and its source is there to be read and edited."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import foldcc
from foldcc.codegen import source
from foldcc.codegen.chains import chain_text, column_sum_text
from foldcc.codegen.names import NoText
from foldcc.compiler import Compiler
from foldcc.errors import FoldError
from foldcc.mesh import FoldedMesh
from foldcc.module import FoldedModule
from foldcc.testing import run_distributed
from foldcc.testing.equivalence import relative_error
from tests.models import FAMILIES, LAYER_KINDS, WITH_AUX_LOSS, tiny_model, token_batch

MESH = "dp=2,tp=2|ep=4"


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOLDCC_CACHE", str(tmp_path_factory.mktemp("kernels")))
        yield


# --- whole models ---


def gradients(model: FoldedModule, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


QUICK = (("deepseek_v3", MESH), ("mixtral", "dp=2"))  # experts on other ranks and on one's own


CASES = [(f, MESH) for f in FAMILIES] + [(f, "dp=2") for f in ("mixtral", "gpt_oss", "llama")]


def marked(family: str, mesh: str) -> Any:
    return pytest.param(family, mesh, marks=() if (family, mesh) in QUICK else pytest.mark.slow)


@pytest.mark.parametrize(("family", "fold"), [marked(*case) for case in CASES])
def test_kernels_give_the_same_losses_and_gradients(family: str, fold: str) -> None:
    mesh, batch = FoldedMesh.parse(fold), token_batch(4, 8)
    model = tiny_model(family, aux_loss=family in WITH_AUX_LOSS, num_hidden_layers=LAYER_KINDS[family])
    aten = foldcc.parallelize(model, mesh, example_inputs=batch, kernels="aten")
    triton = foldcc.parallelize(model, mesh, example_inputs=batch, kernels="triton")
    wanted, found = gradients(aten, batch), gradients(triton, batch)
    assert found.keys() == wanted.keys() and len(triton.kernels) > 10 and len(aten.kernels) == 0
    for name, x in wanted.items():
        assert (found[name] - x).norm() <= 1e-5 * x.norm(), name
    print(triton.kernels.coverage())
    assert triton.kernels.coverage().share >= 0.9
    assert foldcc.verify(triton, rounds=1).ok


def test_only_what_torch_distributed_needs_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number is read off a tensor where rows are exchanged, whose sizes torch.distributed wants on the host; nowhere else."""
    callers: set[str] = set()

    def watched(read: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            frame: Any = sys._getframe(1)
            while not str(frame.f_globals.get("__name__")).startswith("foldcc"):
                frame = frame.f_back
            name = Path(frame.f_code.co_filename).name
            callers.add(name if name == "collectives.py" else f"{name} {frame.f_code.co_name}")
            return read(*args, **kwargs)

        return call

    batch = token_batch(4)
    model = tiny_model("mixtral", num_hidden_layers=1)
    folded = foldcc.parallelize(model, FoldedMesh.parse(MESH), example_inputs=batch, kernels="triton")
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__int__", "__bool__", "__index__"):
            patch.setattr(Tensor, name, watched(getattr(Tensor, name)))
        folded(**batch).loss.backward()
    tables = {k.name for k in folded.kernels.values() if "by_expert" in k.nodes}  # of counts that are on the host
    waiting = {c for c in callers if c.split()[-1] not in tables}
    assert waiting == {"experts.py _splits", "collectives.py"}


# --- single kernels ---


def emitted(fn: Callable[..., Any], inputs: list[Tensor], text: Any = chain_text) -> Any:
    """The launcher of the kernel for everything that a function does."""
    graph = make_fx(fn, tracing_mode="fake")(*inputs)
    nodes = [n for n in graph.graph.nodes if n.op == "call_function"]
    given_, (output,) = list(graph.graph.find_nodes(op="placeholder")), graph.graph.find_nodes(op="output")
    results = output.args[0] if isinstance(output.args[0], (tuple, list)) else [output.args[0]]
    module = source.load(source.write("test", f"{source.HEAD}\n\n{text('kernel', nodes, given_, results)}\n"))
    empty = torch.empty

    class Poisoned:  # what a kernel does not write is NaN
        def __getattr__(self, name: str) -> Any:
            return self.empty if name == "empty" else getattr(torch, name)

        @staticmethod
        def empty(*args: Any, **kwargs: Any) -> Tensor:
            x = empty(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(0)

    module.torch = Poisoned()  # type: ignore[attr-defined]
    return module.kernel  # type: ignore[attr-defined]


def error(found: Any, wanted: Any) -> float:
    """The largest relative error of the results, by norm; infinite where something is not a number."""
    pairs = zip(*(x if isinstance(x, (tuple, list)) else (x,) for x in (found, wanted)), strict=True)
    worst = 0.0
    for x, y in pairs:
        distance = (x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-30)
        worst = max(worst, float("inf") if distance.isnan() else float(distance))
    return worst


def norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * (x * scale), scale


def layer_norm(x: Tensor, weight: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


def norm_backward(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    g = grad * weight
    return g * scale - x * scale.pow(3) * (g * x).mean(-1, keepdim=True)


def softmax(x: Tensor) -> Tensor:
    return torch.softmax(x, -1)


def swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate.clamp(max=2.0)) * up


CHAINS = {
    "norm": (norm, lambda r, w: [(r, w), (w,)]),
    "layer norm": (layer_norm, lambda r, w: [(r, w), (w,)]),
    "norm backward": (norm_backward, lambda r, w: [(r, w + 6), (r, w + 6), (w + 6,)]),  # one column alone would cancel
    "softmax": (softmax, lambda r, w: [(r, w)]),
    "swiglu": (swiglu, lambda r, w: [(r, 2 * w)]),
}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float16, 4e-3)])
@settings(max_examples=4, deadline=None)
@given(rows=st.sampled_from([1, 3, 17, 70]), width=st.sampled_from([1, 7, 32, 100, 4100]), strided=st.booleans())
def test_a_chain_computes_what_its_nodes_compute(
    name: str, dtype: torch.dtype, limit: float, rows: int, width: int, strided: bool
) -> None:
    fn, shapes = CHAINS[name]
    inputs = [torch.randn(s, dtype=dtype) for s in shapes(rows, width)]
    if strided:
        inputs = [torch.stack([x, x], -1)[..., 0] for x in inputs]
    wanted = fn(*(x.double() for x in inputs))
    assert error(emitted(fn, inputs)(*inputs), wanted) <= limit


@settings(max_examples=6, deadline=None)
@given(heads=st.integers(1, 3), length=st.sampled_from([1, 5, 16]), half=st.sampled_from([1, 3, 8]))
def test_rotary_positions_are_one_kernel(heads: int, length: int, half: int) -> None:
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = x.view(2, length, heads, 2 * half).transpose(1, 2)
        turned = torch.cat([-q[..., half:], q[..., :half]], -1)
        return q * cos.unsqueeze(1) + turned * sin.unsqueeze(1)

    inputs = [torch.randn(2, length, heads * 2 * half), torch.randn(1, length, 2 * half), torch.randn(1, length, 2 * half)]
    assert error(emitted(rotate, inputs)(*inputs), rotate(*(x.double() for x in inputs))) <= 1e-6


@settings(max_examples=6, deadline=None)
@given(rows=st.sampled_from([1, 40, 3000]), width=st.sampled_from([1, 33, 200]))
def test_a_column_sum_does_not_depend_on_timing(rows: int, width: int) -> None:
    def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
        return (grad * x).sum([0])

    inputs = [torch.randn(rows, width), torch.randn(rows, width)]
    kernel = emitted(weight_gradient, inputs, column_sum_text)
    assert error(kernel(*inputs), weight_gradient(*(x.double() for x in inputs))) <= 1e-5
    assert torch.equal(kernel(*inputs), kernel(*inputs))


def test_a_row_that_is_longer_than_a_tile_is_a_loop() -> None:
    def loss(logits: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
        shifted = (logits - largest).exp()
        return shifted, shifted.sum(-1)

    inputs = [torch.randn(3, 9001), torch.randn(3, 1)]
    assert error(emitted(loss, inputs)(*inputs), loss(*(x.double() for x in inputs))) <= 1e-5


@pytest.mark.parametrize(
    ("change", "into"),
    [("tl.sum(", "0 * tl.sum("), ("pow_1 = x_1 * x_1", "pow_1 = x_1"), ("r_ok = r < 70", "r_ok = r < 64"), ("/ 33", "/ 64")],
    ids=["no sum", "no square", "last tile left out", "padding counted"],
)
def test_a_wrong_kernel_is_seen(change: str, into: str) -> None:
    def wrong(*arguments: Any) -> str:
        text = chain_text(*arguments)
        assert change in text
        return text.replace(change, into)

    inputs = [torch.randn(70, 33), torch.randn(33)]
    wanted = norm(*(x.double() for x in inputs))
    assert error(emitted(norm, inputs)(*inputs), wanted) <= 1e-5
    assert error(emitted(norm, inputs, wrong)(*inputs), wanted) > 1e-3


def test_nodes_that_do_not_fit_into_a_kernel_say_why() -> None:
    with pytest.raises(NoText, match="rows of 4, 8 elements|rows of 8, 4 elements"):
        emitted(lambda x, y: (x.sum(-1), y.sum(-1)), [torch.randn(3, 4), torch.randn(3, 8)])
    with pytest.raises(NoText, match="has no Triton text"):
        emitted(lambda x: torch.lgamma(x), [torch.randn(3, 4)])


# --- source, files and what a user may get wrong ---


@pytest.fixture(scope="module")
def llama() -> FoldedModule:
    return foldcc.parallelize(tiny_model("llama"), FoldedMesh.parse("dp=2"), example_inputs=token_batch(4), kernels="triton")


def test_a_kernel_says_what_it_is(llama: FoldedModule) -> None:
    kernel = llama.kernels["input_layernorm"]
    assert kernel.source.startswith("# input_layernorm: chain, 6 nodes of block1, forward")
    assert "modeling_llama.py" in kernel.source and "FLOPs" in kernel.source
    assert kernel.source in kernel.path.read_text() and "input_layernorm" in str(llama.kernels)
    assert "input_layernorm(" in str(llama.stages["emit"])


def test_the_stages_before_kernels_are_what_is_counted_and_proved(llama: FoldedModule) -> None:
    plain = foldcc.parallelize(tiny_model("llama"), FoldedMesh.parse("dp=2"), example_inputs=token_batch(4), kernels="aten")
    assert llama.summary() == plain.summary() and str(llama.collectives()) == str(plain.collectives())
    with pytest.raises(FoldError, match="Stage emit holds kernels, which have no meaning over a field"):
        foldcc.verify(llama, stage="emit")


def test_an_edited_kernel_is_called(llama: FoldedModule, tmp_path: Path) -> None:
    kernel, edited = llama.kernels["input_layernorm"], tmp_path / "edited.py"
    edited.write_text(kernel.path.read_text().replace("mul_1 = p_", "mul_1 = 0 * p_", 1))
    other = edit(edited)
    batch = token_batch(4)
    assert not torch.allclose(gradients(other, batch)["loss"], gradients(llama, batch)["loss"])


def test_a_file_that_is_edited_again_is_read_again(llama: FoldedModule, tmp_path: Path) -> None:
    path = tmp_path / "again.py"
    for number in (1, 2):
        path.write_text(f"NUMBER = {number}\n")
        assert foldcc.load_kernels(path).NUMBER == number


def edit(path: Path) -> FoldedModule:
    kernels = foldcc.load_kernels(path)
    return foldcc.parallelize(tiny_model("llama"), FoldedMesh.parse("dp=2"), example_inputs=token_batch(4), kernels=kernels)


class Two(nn.Module):
    """Two results of one product."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.linear(x)
        return (y.tanh() * 2 + 1) * 3, (y.sigmoid() * 2 + 1) * 3


def test_kernels_of_a_program_for_other_gradients_have_names_of_their_own(tmp_path: Path) -> None:
    plain, x = Two(), torch.randn(4, 6, 8)
    emitted = foldcc.parallelize(copy.deepcopy(plain), "dp=2", example_inputs=(x,), kernels="triton")
    texts = dict.fromkeys(k.path.read_text() for k in emitted.kernels.values())
    (tmp_path / "edited.py").write_text("\n\n".join(texts))
    edited = foldcc.parallelize(
        copy.deepcopy(plain), "dp=2", example_inputs=(x,), kernels=foldcc.load_kernels(tmp_path / "edited.py")
    )
    first = dict(edited.kernels)
    for output in (0, 1):
        for m in (plain, edited):
            m.zero_grad()
            m(x)[output].square().sum().backward()
        assert relative_error(edited.linear.weight.grad, plain.linear.weight.grad) < 1e-5
        backward = {name: k.key for name, k in edited.kernels.items() if k.direction == "backward"}
        assert backward.keys() - first.keys() and all(first[n].key == key for n, key in backward.items() if n in first)


def test_an_edited_kernel_that_takes_something_else_is_an_error(llama: FoldedModule, tmp_path: Path) -> None:
    path = tmp_path / "parameters.py"
    path.write_text("def input_layernorm(x):\n    return x\n")
    with pytest.raises(FoldError, match=r"The edited kernel input_layernorm takes \(x\), and its node gives"):
        edit(path)


def test_an_edited_kernel_that_returns_something_else_is_an_error(llama: FoldedModule, tmp_path: Path) -> None:
    launcher = llama.kernels["input_layernorm"].source.split("\ndef input_layernorm(")[1].split(")")[0]
    path = tmp_path / "results.py"
    path.write_text(f"import torch\n\ndef input_layernorm({launcher}):\n    return torch.zeros(1)\n")
    with pytest.raises(FoldError, match="The edited kernel input_layernorm returns another type or shape than its node"):
        edit(path)(**token_batch(4))


def test_a_file_of_kernels_that_is_not_there_or_no_python(tmp_path: Path) -> None:
    with pytest.raises(FoldError, match="There is no file of kernels"):
        foldcc.load_kernels(tmp_path / "none.py")
    (tmp_path / "broken.py").write_text("def (")
    with pytest.raises(FoldError, match="cannot be read"):
        foldcc.load_kernels(tmp_path / "broken.py")


def test_a_cache_that_cannot_be_written_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FOLDCC_CACHE", str(tmp_path / "file"))
    with pytest.raises(FoldError, match="Emitted kernels cannot be written"):
        source.write("kernels", "x = 1\n")


def written(folder: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOLDCC_CACHE", folder)
        for i in range(30):
            source.write(f"kernels{i}", f"x = {i}\n" * 20_000)


def test_processes_that_emit_at_once_leave_whole_files(tmp_path: Path) -> None:
    run_distributed(written, 2, str(tmp_path))
    texts = {path.read_text() for path in tmp_path.iterdir()}
    assert texts == {f"x = {i}\n" * 20_000 for i in range(30)} and len(list(tmp_path.iterdir())) == 30


def test_kernels_of_an_unknown_kind_are_an_error() -> None:
    with pytest.raises(FoldError, match="There are no kernels 'cuda'"):
        foldcc.parallelize(tiny_model("llama"), FoldedMesh.parse("dp=2"), kernels="cuda")


def test_a_kernel_that_is_not_there_is_an_error(llama: FoldedModule) -> None:
    with pytest.raises(FoldError, match="There is no kernel 'rmsnorm'"):
        llama.kernels["rmsnorm"]


def test_triton_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "triton", None)
    with pytest.raises(FoldError, match="Triton is not installed"):
        source.require_triton()


def test_triton_of_another_version_is_an_error_or_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.__version__", "4.1.0")
    with pytest.raises(FoldError, match="Triton 4.1.0 is installed, and kernels are written for 3.6 and 3.7"):
        source.require_triton()
    assert_a_note(monkeypatch, "Triton 4.1.0 is installed")


def test_an_interpreter_that_fails_on_numpy_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.__version__", "3.6.0")
    monkeypatch.setattr("numpy.__version__", "2.4.6")
    with pytest.raises(FoldError, match=r"The interpreter of Triton 3.6.0 fails on NumPy 2.4.6(?s:.*)numpy<2.4"):
        source.require_triton()
    with monkeypatch.context() as here:
        here.setattr("triton.__version__", "3.7.1")
        assert source.unusable() is None
        here.setattr("triton.__version__", "3.6.0")
        here.setattr("numpy.__version__", "2.3.5")
        assert source.unusable() is None
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    with source.only_compiled_for("sm_90"):  # nothing is interpreted
        assert source.unusable() is None


def test_a_gpu_that_is_too_old_is_an_error_or_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (7, 0))
    with pytest.raises(FoldError, match="The GPU is an sm_70, and kernels are written for sm_80 and later"):
        source.require_triton()
    assert_a_note(monkeypatch, "The GPU is an sm_70")


def assert_a_note(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    """What was chosen automatically runs as ATen, and says why."""
    with monkeypatch.context() as here:
        here.setattr("torch.cuda.is_available", lambda: False)
        folded = foldcc.parallelize(tiny_model("llama"), FoldedMesh.parse("dp=2"))
    monkeypatch.setattr(Compiler, "device", lambda *_: torch.device("cuda"))
    assert folded._compiler.emission(folded)[0] == () and folded.kernels.notes[0].startswith(why)
