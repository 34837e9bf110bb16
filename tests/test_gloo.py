"""A folded model on real processes trains as the same model does in one process."""

from __future__ import annotations

import tempfile
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from models import FAMILIES, WITH_AUX_LOSS, tiny_model, token_batch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from versions import joins_blocks

import foldcc
from foldcc.testing import in_float64, run_distributed
from foldcc.testing.equivalence import relative_error

MESHES = ["dp=2,tp=2|ep=4", "dp=4,tp=2|ep=8", "dp=2,tp=4|ep=4,etp=2"]
TOLERANCE = 1e-5
# In float64 all steps are compared. AdamW divides each gradient by its own size, so what is rounding in float32 becomes a
# step of full length where a gradient is nearly zero; there the first step is compared, before any update.
PRECISIONS = {torch.float64: (1e-10, 3), torch.float32: (TOLERANCE, 1)}


class Mlp(nn.Module):
    """A model without dummy inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return (self.down(torch.relu(self.up(x))) - x).square().mean()


def own(mesh: foldcc.FoldedMesh, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The samples of this rank."""
    position = mesh.coordinate(dist.get_rank(), "dp")
    return {name: x.chunk(mesh.size("dp"))[position] for name, x in batch.items()}


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def train(model: nn.Module, batch: dict[str, Tensor], clip: Any) -> dict[str, Any]:
    """The gradients of the first of three steps, and the loss and the gradient norm of each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    gradients: dict[str, Tensor] = {}
    losses, norms = [], []
    for _ in range(3):
        optimizer.zero_grad()
        result = model(**batch)
        loss = result if isinstance(result, Tensor) else result.loss
        loss.backward()
        gradients = gradients or {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        norms.append(clip(model.parameters(), 1.0).item())
        optimizer.step()
        losses.append(loss.item())
    return {"gradients": gradients, "losses": losses, "norms": norms}


def model_of(family: str, options: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    return tiny_model(family, aux_loss=family in WITH_AUX_LOSS, **options).to(dtype)


def lifted(dtype: torch.dtype) -> AbstractContextManager[Any]:
    return in_float64() if dtype == torch.float64 else nullcontext()


def train_folded(
    family: str, text: str, dtypes: tuple[torch.dtype, ...], options: dict[str, Any], folder: str
) -> dict[torch.dtype, dict[str, Any]]:
    mesh = foldcc.FoldedMesh.parse(text, "cpu")
    batch = own(mesh, token_batch(2 * mesh.size("dp")))
    results = {}
    for dtype in dtypes:
        model = model_of(family, options, dtype)
        with lifted(dtype):
            folded = foldcc.parallelize(model, mesh, example_inputs=batch)
            result = train(folded, batch, foldcc.clip_grad_norm_)
        result["names"] = list(folded.state_dict())
        result["restored"] = restored(folded, f"{folder}/{dtype}")
        results[dtype] = result if dist.get_rank() == 0 else {"losses": result["losses"], "norms": result["norms"]}
    return results


def restored(folded: nn.Module, folder: str) -> bool:
    """Whether a checkpoint brings back what every rank had."""
    before = {name: p.detach().clone() for name, p in folded.state_dict().items()}
    checkpoint.save(folded.state_dict(), checkpoint_id=folder)
    with torch.no_grad():
        for parameter in folded.parameters():
            parameter.zero_()
    state = folded.state_dict()
    checkpoint.load(state, checkpoint_id=folder)
    folded.load_state_dict(state)
    return all(torch.equal(_held(p), _held(before[name])) for name, p in folded.state_dict().items())


def _held(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def check_training(family: str, text: str, *dtypes: torch.dtype, **options: Any) -> None:
    mesh = foldcc.FoldedMesh.parse(text)
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_distributed(train_folded, mesh.world_size, family, text, dtypes, options, folder, timeout=400)
    for dtype in dtypes:
        tolerance, steps = PRECISIONS[dtype]
        model = model_of(family, options, dtype)
        model.config._experts_implementation = "eager"
        names = list(model.state_dict())
        with lifted(dtype):
            wanted = train(model, token_batch(2 * mesh.size("dp")), nn.utils.clip_grad_norm_)
        found = ranks[0][dtype]
        assert found["names"] == names
        assert found["restored"]
        assert found["gradients"].keys() == wanted["gradients"].keys()
        for name, gradient in wanted["gradients"].items():
            assert relative_error(found["gradients"][name], gradient) <= tolerance, name
        for rank in ranks:
            assert rank[dtype]["losses"][:steps] == pytest.approx(wanted["losses"][:steps], rel=tolerance)
            assert rank[dtype]["norms"] == found["norms"]
        assert found["norms"][:steps] == pytest.approx(wanted["norms"][:steps], rel=tolerance)


@joins_blocks
@pytest.mark.parametrize(
    ("mesh", "dtypes"),
    [("tp=4|ep=2,etp=2", [torch.float64]), pytest.param("dp=2,tp=4|ep=2,etp=2", PRECISIONS, marks=pytest.mark.slow)],
)
def test_experts_divided_over_two_axes_train_as_in_one_process(mesh, dtypes):
    check_training("mixtral", mesh, *dtypes, num_hidden_layers=1)


@pytest.mark.parametrize(
    ("mesh", "dtypes"), [("tp=2", [torch.float32]), pytest.param("dp=2,tp=2", PRECISIONS, marks=pytest.mark.slow)]
)
def test_tied_embeddings_stay_one_parameter_and_train_as_in_one_process(mesh, dtypes):
    check_training("llama", mesh, *dtypes, tie_word_embeddings=True, num_hidden_layers=1)


@pytest.mark.slow
@pytest.mark.parametrize("text", MESHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_as_in_one_process(family: str, text: str):
    check_training(family, text, *PRECISIONS)


def train_compiled_at_first_call(batch: dict[str, Tensor]) -> dict[str, Any]:
    mesh = foldcc.FoldedMesh.parse("dp=2,tp=2", "cpu")
    torch.manual_seed(0)
    folded = foldcc.parallelize(Mlp(), mesh)
    before = [id(p) for p in folded.parameters()]
    result = train(folded, own(mesh, batch), foldcc.clip_grad_norm_)
    result["same objects"] = before == [id(p) for p in folded.parameters()]
    result["divided"] = [name for name, p in folded.named_parameters() if p.to_local().numel() < p.numel()]
    return result


def test_an_optimizer_made_before_the_first_call_trains_the_parameters():
    random = torch.Generator().manual_seed(1)
    batch = {"x": torch.randn(4, 8, 8, generator=random)}
    found = run_distributed(train_compiled_at_first_call, 4, batch)[0]
    torch.manual_seed(0)
    wanted = train(Mlp(), batch, nn.utils.clip_grad_norm_)
    assert found["same objects"]
    assert found["divided"]
    assert found["losses"] == pytest.approx(wanted["losses"], rel=TOLERANCE)
    for name, gradient in wanted["gradients"].items():
        assert relative_error(found["gradients"][name], gradient) <= TOLERANCE, name


def compiled_and_not(text: str, device_type: str) -> float:
    """The largest difference that torch.compile makes to the loss or to a gradient."""
    mesh = foldcc.FoldedMesh.parse(text, device_type)
    torch.manual_seed(0)
    batch = {"x": torch.randn(2 * mesh.size("dp"), 8, 8)}
    batch = batch if mesh.is_virtual else own(mesh, batch)
    folded = foldcc.parallelize(Mlp(), mesh, example_inputs=batch)
    results = []
    for model in (folded, torch.compile(folded)):
        folded.zero_grad()
        loss = model(**batch)
        loss.backward()
        results.append([whole(loss), *(whole(p.grad) for p in folded.parameters())])
    return max((a - b).abs().max().item() for a, b in zip(*results, strict=True))


def test_torch_compile_changes_nothing_on_a_virtual_mesh():
    assert compiled_and_not("dp=2,tp=2", "virtual") == 0


def test_torch_compile_changes_nothing_on_processes():
    assert set(run_distributed(compiled_and_not, 4, "dp=2,tp=2", "cpu")) == {0.0}


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise KeyError("no such thing")
    dist.barrier()


def test_the_failing_rank_is_named_with_its_traceback():
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 3 failed:.*fail_on.*KeyError: 'no such thing'"):
        run_distributed(fail_on, 3, 1)


def wait_for_nobody() -> None:
    if dist.get_rank() == 0:
        dist.barrier()


def test_ranks_that_hang_are_ended():
    with pytest.raises(TimeoutError, match="of 2 ranks, 0 did not finish within 8 s"):
        run_distributed(wait_for_nobody, 2, timeout=8)
