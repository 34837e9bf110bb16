"""Weights in the files of the model's library: each rank reads what it holds, and the library reads what ranks write."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import FAMILIES, tiny_model, token_batch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import foldcc
from foldcc.checkpoints import files
from foldcc.checkpoints.pieces import Piece, leaf, part, whole
from foldcc.testing import run_distributed

# --- tensors that are not read yet -------------------------------------------------------------------------------------


def tensor(*shape: int) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


MOVES: dict[str, Callable[..., Any]] = {
    "experts": lambda a, b: torch.cat([torch.stack([a, b], 0), torch.stack([b, a])], 1),
    "chunks": lambda a, b: torch.cat([a, b], -1).chunk(4, 1),
    "uneven": lambda a, b: a.split([1, 5]),
    "transposed": lambda a, b: torch.transpose(torch.stack([a, b], 1), 0, 2).contiguous(),
    "cycled": lambda a, b: torch.stack([a, b]).permute(1, 2, 0),
    "rope": lambda a, b: a.view(3, 2, 8).transpose(0, 1).reshape(6, 8),
    "joined": lambda a, b: a.T.reshape(4, 12),
    "flat": lambda a, b: b.permute(1, 0).reshape(-1),
    "steps": lambda a, b: (a[1:5:2], b[2], a[..., None, :], a[:1].squeeze(0), b.unbind(1)),
    "cast": lambda a, b: a.to(torch.bfloat16).float(),
    "computed": lambda a, b: (1 + a / 2).chunk(2, 1),
    "parameter": lambda a, b: nn.Parameter(torch.cat([a, b])).detach(),
}


@pytest.mark.parametrize("name", MOVES)
def test_a_part_of_what_is_made_of_unread_tensors_is_the_part_of_what_is_made_of_tensors(name: str) -> None:
    given, draw = [tensor(6, 8), -tensor(6, 8)], random.Random(0)
    made = MOVES[name](*(leaf(x.shape, x.dtype, i, lambda at, x=x: x[at]) for i, x in enumerate(given)))
    for piece, wanted in zip(leaves(made), leaves(MOVES[name](*given)), strict=True):
        assert isinstance(piece, Piece) and piece.shape == wanted.shape and piece.stride() == wanted.stride()
        assert torch.equal(whole(piece), wanted)
        at = [torch.tensor(sorted(draw.sample(range(n), draw.randint(1, n)))) for n in wanted.shape]
        for dim, places in enumerate(at):
            wanted = wanted.index_select(dim, places)
        assert torch.equal(part(piece, at), wanted)


def leaves(x: Any) -> list[Any]:
    return [z for y in x for z in leaves(y)] if isinstance(x, (tuple, list)) else [x]


def test_of_unread_tensors_nothing_is_read_but_the_part_that_is_wanted() -> None:
    read: list[int] = []

    def fetch(at: tuple[slice, ...]) -> Tensor:
        read.append(tensor(8, 16)[at].numel())
        return tensor(8, 16)[at]

    experts = torch.stack([torch.cat([leaf((8, 16), torch.float32, i, fetch) for i in "ab"], 0).T for _ in range(4)])
    found = part(experts, [torch.tensor([1, 3]), torch.arange(4, 8), torch.tensor([0, 1, 8, 9])])
    assert found.shape == (2, 4, 4) and sum(read) == found.numel()


# --- loading and storing -----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    silence()
    yield
    transformers.logging.set_verbosity_warning()
    transformers.utils.logging.enable_progress_bar()


def silence() -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def empty(family: str, **changes: Any) -> Any:
    with torch.device("meta"):
        return tiny_model(family, **changes)


def folded(family: str, mesh: Any, samples: int = 4, **options: Any) -> foldcc.FoldedModule:
    model = empty(family, **options.pop("changes", {}))
    return foldcc.parallelize(model, mesh, example_inputs=token_batch(samples), **options)


def assert_the_same(model: Any, other: nn.Module) -> None:
    wanted = dict(other.state_dict())
    found = model if isinstance(model, dict) else model.state_dict()
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert torch.equal(found[name], x) and found[name].dtype == x.dtype, name


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f == "mixtral" else pytest.mark.slow) for f in FAMILIES])
def test_what_the_library_stores_is_loaded_and_what_is_stored_the_library_loads(family: str, tmp_path: Path) -> None:
    changes = {"num_hidden_layers": 1} if family == "mixtral" else {}
    plain, batch = tiny_model(family, **changes), token_batch(4)
    plain.save_pretrained(tmp_path / "plain")
    model = foldcc.load_pretrained(folded(family, "dp=2,tp=2|ep=2,etp=2", changes=changes), tmp_path / "plain")
    assert_the_same(model, plain)
    torch.testing.assert_close(model(**batch).loss, plain(**batch).loss)
    model.save_pretrained(tmp_path / "folded", max_shard_size="40kB")
    again = type(plain).from_pretrained(tmp_path / "folded")
    assert_the_same(again, plain)
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "folded" / name).read_text() == (tmp_path / "plain" / name).read_text()
    stored = {name for file in (tmp_path / "folded").glob("*.safetensors") for name in load_file(file)}
    assert stored == set(load_file(tmp_path / "plain" / "model.safetensors"))


def on_ranks(folder: str, family: str, text: str, options: dict[str, Any]) -> dict[str, Any]:
    silence()
    plain, mesh = tiny_model(family, **options.get("changes", {})), foldcc.FoldedMesh.parse(text, "cpu")
    model = foldcc.load_pretrained(folded(family, mesh, **options), Path(folder) / "plain")
    wrong = [n for n, p in model.named_parameters() if not torch.equal(p.full_tensor(), plain.get_parameter(n))]
    batch = token_batch(4)
    loss = model(**{n: x[2 * mesh.coordinate(mesh.here, "dp") :][:2] for n, x in batch.items()} if "dp" in text else batch).loss
    model.save_pretrained(Path(folder) / "folded", max_shard_size=50_000)
    return {"wrong": wrong, "loss": float(loss)}


@pytest.mark.parametrize(
    ("family", "text", "options"),
    [
        ("mixtral", "tp=2|ep=1,etp=2", {"zero": 3, "changes": {"tie_word_embeddings": True, "num_hidden_layers": 1}}),
        ("llama", "pp=2", {"changes": {"tie_word_embeddings": True}}),
        pytest.param("mixtral", "dp=2,tp=2|ep=2,etp=2", {"zero": 3}, marks=pytest.mark.slow),
        pytest.param("gpt_oss", "tp=4|ep=2,etp=2", {"zero": 1}, marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "pp=2,tp=2|ep=2", {}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_processes_read_and_write_their_parts(family: str, text: str, options: dict[str, Any], tmp_path: Path) -> None:
    plain = tiny_model(family, **options.get("changes", {}))
    plain.save_pretrained(tmp_path / "plain", max_shard_size="60kB")
    samples = {"samples": 2} if "dp" in text else {}
    ranks = run_distributed(
        on_ranks, foldcc.FoldedMesh.parse(text).world_size, str(tmp_path), family, text, {**options, **samples}
    )
    assert not any(r["wrong"] for r in ranks)
    torch.testing.assert_close(torch.tensor(ranks[0]["loss"]), plain(**token_batch(4)).loss, atol=1e-5, rtol=1e-5)
    assert_the_same(type(plain).from_pretrained(tmp_path / "folded"), plain)


# --- what is refused ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    tiny_model("mixtral", num_hidden_layers=1).save_pretrained(folder, max_shard_size="20kB")
    return folder


@pytest.fixture(scope="module")
def model() -> foldcc.FoldedModule:
    plain = tiny_model("mixtral", num_hidden_layers=1, seed=1)
    return foldcc.parallelize(plain, "dp=2,tp=2|ep=4", example_inputs=token_batch(4))


def second(folder: Path) -> Path:
    return sorted(folder.glob("model-*"))[1]


def missing_file(folder: Path) -> None:
    second(folder).unlink()


def cut_off(folder: Path) -> None:
    path = second(folder)
    os.truncate(path, path.stat().st_size - 8)


def no_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


def quantised(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))


def rewritten(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors: dict[str, Tensor] = {}
        for path in folder.glob("model*.safetensors"):
            tensors |= load_file(path)
        no_weights(folder)
        change(tensors)
        save_file(tensors, folder / files.SINGLE)

    return rewrite


def double(tensors: dict[str, Tensor]) -> None:
    tensors.update({name: x.double() for name, x in tensors.items()})


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "a file is missing": (missing_file, r"(?s)model-00002-of-.....\.safetensors is missing, cut off.*No such file"),
    "a file is cut off": (cut_off, r"(?s)model-00002-of-.....\.safetensors is missing, cut off.*not fully covered"),
    "no weights": (no_weights, r"(?s)There is no model.safetensors and no model.safetensors.index.json.*config.json"),
    "quantised": (quantised, r"(?s)The weights are quantised \(fp8\).*before it was quantised"),
    "missing": (
        rewritten(lambda x: x.pop("model.norm.weight")),
        r"(?s)1 tensors are missing, 0 are.*missing model.norm.weight",
    ),
    "one expert is missing": (
        rewritten(lambda x: x.pop("model.layers.0.block_sparse_moe.experts.3.w2.weight")),
        r"(?s)0 tensors are missing, 0 are not.*1 have other shapes.*experts.down_proj: \[7, 32, 48\] for \[8, 32, 48\]",
    ),
    "extra": (rewritten(lambda x: x.update({"other.weight": tensor(2)})), "(?s)1 are not the model's.*extra *other.weight"),
    "other shape": (
        rewritten(lambda x: x.update({"model.norm.weight": tensor(31)})),
        r"(?s)1 have other shapes.*model.norm.weight: \[31\] for \[32\]",
    ),
    "rounded": (rewritten(double), r"(?s)would be rounded to another dtype.*torch.float64 for torch.float32.*cast=True"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_named_before_anything_is_loaded(
    case: str, stored: Path, model: foldcc.FoldedModule, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(stored, tmp_path / "checkpoint"))
    spoil, message = BAD[case]
    spoil(folder)
    before = {n: x.clone() for n, x in model.state_dict().items()}
    with pytest.raises(foldcc.FoldError, match=message):
        foldcc.load_pretrained(model, folder)
    assert_the_same(model, _Holding(before))


class _Holding(nn.Module):
    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.state = state

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.state


def test_what_both_have_is_loaded_on_request_and_rounded_on_request(stored: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stored, tmp_path / "checkpoint"))
    rewritten(lambda x: (double(x), x.pop("model.norm.weight"), x.update({"other.weight": tensor(2)})))(folder)
    plain = tiny_model("mixtral", num_hidden_layers=1, seed=1)
    model = foldcc.parallelize(plain, "dp=2", example_inputs=token_batch(4))
    foldcc.load_pretrained(model, folder, strict=False, cast=True)
    wanted = tiny_model("mixtral", num_hidden_layers=1)
    wanted.model.norm = plain.model.norm
    assert_the_same(model, wanted)
    on_meta = foldcc.parallelize(empty("mixtral", num_hidden_layers=1), "dp=2", example_inputs=token_batch(4))
    with pytest.raises(foldcc.FoldError, match="1 tensors are missing"):
        foldcc.load_pretrained(on_meta, folder, strict=False, cast=True)
    with pytest.raises(foldcc.FoldError, match="load_pretrained takes a folded model, not MixtralForCausalLM"):
        foldcc.load_pretrained(plain, folder)  # type: ignore[arg-type]


def test_a_lower_precision_is_loaded_into_a_higher_one(tmp_path: Path) -> None:
    plain = tiny_model("llama").to(torch.bfloat16)
    plain.save_pretrained(tmp_path)
    model = foldcc.load_pretrained(folded("llama", "tp=2"), tmp_path)
    assert_the_same(model, plain.float())
    model.to(torch.bfloat16).save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"
    assert_the_same(type(plain).from_pretrained(tmp_path / "again", dtype="auto"), plain.to(torch.bfloat16))


def test_a_model_of_no_library_is_stored_under_its_own_names(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 8))
    model = foldcc.parallelize(plain, "dp=2,tp=2", example_inputs=(tensor(4, 8),))
    model.save_pretrained(tmp_path)
    assert_the_same(load_file(tmp_path / files.SINGLE), plain)
    nn.init.zeros_(model.get_parameter("0.weight"))
    assert_the_same(foldcc.load_pretrained(model, tmp_path), plain)
    with pytest.raises(foldcc.FoldError, match=r"(?s)'5 gigs' is no size.*200MB"):
        model.save_pretrained(tmp_path, max_shard_size="5 gigs")


def no_room(folder: str) -> str:
    """What is said where one rank's disk is full."""
    mesh = foldcc.init_folded_mesh("cpu", attention={"tp": 2})
    model = foldcc.parallelize(two_layers(1), mesh, example_inputs=(tensor(4, 8),))
    if mesh.here == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
    try:
        model.save_pretrained(folder, max_shard_size=600)
    except foldcc.FoldError as error:
        return str(error)
    return ""


def two_layers(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))


def test_a_disk_that_fills_leaves_what_was_there(tmp_path: Path) -> None:
    plain = two_layers(0)
    foldcc.parallelize(plain, "dp=1").save_pretrained(tmp_path)
    first, other = run_distributed(no_room, 2, str(tmp_path), fresh=True)
    assert "Rank 1 of 2 failed" in first and "File too large" in first
    assert "cannot be written, and is as it was: File too large" in other
    assert [p.name for p in tmp_path.iterdir()] == [files.SINGLE]
    assert_the_same(load_file(tmp_path / files.SINGLE), plain)


def test_a_folder_that_cannot_be_written_is_an_error(model: foldcc.FoldedModule, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(foldcc.FoldError, match=r"(?s)file cannot be written, and is as it was: Not a directory"):
        model.save_pretrained(tmp_path / "file")
