"""Accelerate with folded models: batches go by data-parallel rank, and nothing is wrapped around the model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator as Accelerates
from accelerate import DistributedType, PartialState
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from foldcc.changed import changed
from foldcc.checkpoints.storing import whole_values
from foldcc.errors import FoldError
from foldcc.mesh import FoldedMesh
from foldcc.module import FoldedModule
from foldcc.runtime.clip import clip_grad_norm_
from foldcc.runtime.wires import on_all_places
from foldcc.saving import load, save

_ALONE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class Accelerator(Accelerates):
    """Accelerate's, for models that are folded on one mesh.

        accelerator = Accelerator(mesh, gradient_accumulation_steps=4)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    Ranks of one `dp` coordinate are given the same batches, and what is gathered or reduced counts each sample once. Gradients
    are clipped by `foldcc.clip_grad_norm_`. States are saved by `torch.distributed.checkpoint`, and loaded on any fold.

    Args:
        mesh: of the models that are prepared.
        options: Accelerate's own.

    Raises:
        FoldError: another plugin is to divide the model, or batches are to be dispatched by the first rank.
    """

    def __init__(self, mesh: FoldedMesh, **options: Any):
        super().__init__(**{"cpu": mesh.device_type == "cpu", **options})
        self.mesh = mesh
        if self.distributed_type not in _ALONE or self.state.device_mesh is not None:
            raise FoldError(
                f"Accelerate is to divide the model itself, as {self.distributed_type.value}.",
                valid="an Accelerator without plugins and ParallelismConfig; parallelize(zero=3) for what FSDP does",
            )
        if self.num_processes != (1 if mesh.is_virtual else mesh.world_size):
            raise FoldError(
                f"Accelerate has found {self.num_processes} processes.",
                mesh=repr(mesh),
                valid="torchrun, one process for each rank",
            )
        if self.dispatch_batches:
            raise FoldError("dispatch_batches=True has one rank cut batches for all, by rank.", valid="False, or none")
        self.dataloader_config.dispatch_batches = False

    # --- what is prepared ---

    def prepare_model(self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False) -> Any:
        """As of Accelerate, without a wrapper around a folded model, which reduces its own gradients."""
        if isinstance(model, FoldedModule):
            vars(model).setdefault("_is_accelerate_prepared", False)
            device_placement, evaluation_mode = False, True
        return super().prepare_model(model, device_placement, evaluation_mode)

    def prepare_data_loader(self, *args: Any, **options: Any) -> Any:
        """As of Accelerate, with the batches of this rank's `dp` coordinate."""
        with self._by_samples():
            return super().prepare_data_loader(*args, **options)

    def prepare_scheduler(self, scheduler: Any) -> Any:
        """As of Accelerate, which steps once for each rank that has batches of its own."""
        prepared = super().prepare_scheduler(scheduler)
        step = prepared.step

        def by_samples(*args: Any, **options: Any) -> None:
            with self._by_samples():
                step(*args, **options)

        prepared.step = by_samples
        return prepared

    @contextmanager
    def _by_samples(self) -> Iterator[None]:
        """As if ranks that share their samples were one."""
        place = 0 if self.mesh.is_virtual else self.mesh.index(dist.get_rank(), self.mesh.samples)
        told = {"num_processes": len(self._samples), "process_index": place}
        with changed(PartialState().__dict__, told), changed(self.state.__dict__, told):
            yield

    @property
    def _samples(self) -> tuple[int, ...]:
        """Ranks that hold all samples, each once."""
        return (0,) if self.mesh.is_virtual else self.mesh.group_of(0, self.mesh.samples)

    # --- what ranks tell each other ---

    def gather(self, tensor: Any) -> Any:
        """The values of all samples, each once, in the order of the ranks that share them."""

        def each_once(x: Tensor) -> Tensor:
            rows = x.unflatten(0, (self.num_processes, -1))
            return rows[list(self._samples)].flatten(0, 1)

        return recursively_apply(each_once, super().gather(self.whole(tensor)))

    def whole(self, tensor: Any) -> Any:
        """This rank's samples of what a model has returned, also where `tp` divides them or other pipeline stages have them."""

        def one(x: Tensor) -> Tensor:
            return on_all_places(x.full_tensor() if isinstance(x, DTensor) else x, self.mesh)

        return recursively_apply(one, tensor)

    def pad_across_processes(self, tensor: Any, *args: Any, **options: Any) -> Any:
        """As of Accelerate, of this rank's samples."""
        return super().pad_across_processes(self.whole(tensor), *args, **options)

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """The sum or the mean over the `dp` coordinates."""

        def over_samples(x: Tensor) -> Tensor:
            rows = self.gather(x).view(len(self._samples), *x.shape)
            return rows.mean(0) if reduction == "mean" else rows.sum(0) * scale

        return tensor if reduction == "none" else recursively_apply(over_samples, tensor)

    def clip_grad_norm_(self, parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2) -> Tensor:
        """As `foldcc.clip_grad_norm_`, over both sides of the mesh."""
        self.unscale_gradients()
        return clip_grad_norm_(parameters, max_norm, norm_type)

    # --- states ---

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> dict[str, Any]:
        """Whole values, on the first rank. Every rank calls it."""
        options, folded = StateDictOptions(full_state_dict=True, cpu_offload=True), self.unwrap_model(model)
        if self.mesh.is_virtual or self.mesh.size("pp") == 1:
            return get_model_state_dict(folded, options=options)
        found: dict[str, Any] = {}
        for names, x in whole_values(folded):
            if self.is_main_process:
                found |= dict.fromkeys(names, x.cpu())
        return found

    def save_state(self, output_dir: str | None = None, *args: Any, **options: Any) -> Any:
        """As of Accelerate; models and their optimizers are stored by `foldcc.save`, and loaded on any fold."""
        with self._apart():
            folder = super().save_state(output_dir, *args, **options)
        for i, model in enumerate(self._models):
            save(os.path.join(folder, _OURS, str(i)), model, self._optimizers_of(model))
        return folder

    def load_state(self, input_dir: str | None = None, *args: Any, **options: Any) -> None:
        """As of Accelerate, on any fold."""
        if input_dir is None:
            raise FoldError("load_state is not told of which folder.", valid="what save_state returned")
        for i, model in enumerate(self._models):
            load(os.path.join(input_dir, _OURS, str(i)), model, self._optimizers_of(model))
        with self._apart():
            super().load_state(input_dir, *args, **options)

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """As if there were no models, for those are stored in another way."""
        with changed(self.__dict__, {"_models": [], "_optimizers": []}):
            yield

    def _optimizers_of(self, model: nn.Module) -> list[Optimizer]:
        own = {id(p) for p in model.parameters()}
        plain = [x.optimizer for x in self._optimizers]
        return [x for x in plain if any(id(p) in own for group in x.param_groups for p in group["params"])]


_OURS = "folded"  # a folder beside what Accelerate writes
