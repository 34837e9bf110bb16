"""Transformers' Trainer with folded models."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.trainer import TRAINING_ARGS_NAME

from foldcc.changed import changed
from foldcc.errors import FoldError
from foldcc.module import FoldedModule
from foldcc.saving import load, save
from foldcc.trainers.accelerate import Accelerator


class Trainer(transformers.Trainer):
    """Transformers' Trainer, for a model that is folded.

        trainer = Trainer(model=foldcc.parallelize(model, mesh), args=..., train_dataset=...)

    `per_device_train_batch_size` is that of each data-parallel rank. A checkpoint is resumed on any fold; where `dp` is another
    one, the batch size is to be such that all ranks together take as many samples. A trainer that is derived from Transformers'
    and takes the loss that the model returns works as well: `class MyTrainer(Theirs, foldcc.trainers.transformers.Trainer)`.

    Raises:
        FoldError: the model is not folded, or in a way that the trainer cannot train.
    """

    def __init__(self, model: Any = None, *args: Any, **options: Any):
        if model is None and options.get("model_init") is not None:
            raise FoldError("model_init makes the model anew for each run.", valid="model=foldcc.parallelize(model, mesh)")
        if not isinstance(model, FoldedModule):
            raise FoldError(f"{type(model).__name__} is not folded.", valid="model=foldcc.parallelize(model, mesh)")
        model.take_any_structure()  # training calls with a number of items, and evaluation without
        super().__init__(model, *args, **options)
        if (self.compute_loss_func or self.label_smoother) and model.mesh.passed < model.mesh.data_parallel:
            raise FoldError(
                "compute_loss_func and label_smoothing_factor make a loss of each rank's samples, not of all.",
                mesh=str(model.mesh),
                valid="a loss in the model's forward",
            )

    def create_accelerator_and_postprocess(self) -> None:
        ours = partial(Accelerator, self.model.mesh)
        with changed(vars(transformers.trainer), {"Accelerator": ours}):
            super().create_accelerator_and_postprocess()

    def get_total_train_batch_size(self, args: Any) -> int:
        parts = self.model.mesh.data_parallel // self.model.mesh.passed
        return int(self._train_batch_size * args.gradient_accumulation_steps * parts)

    def create_optimizer(self, *args: Any, **options: Any) -> torch.optim.Optimizer:
        # Groups for each mesh would differ from fold to fold, and with them what a checkpoint holds of groups.
        with changed(vars(transformers.trainer), {"has_mixed_dtensor": lambda tensors: False}):
            return super().create_optimizer(*args, **options)

    def compute_loss(self, *args: Any, **options: Any) -> Any:
        # The loss is that of all ranks already, and is not multiplied by their number, as one that DDP divides by it is.
        with changed(self.args.__dict__, {"average_tokens_across_devices": False}):
            return super().compute_loss(*args, **options)

    def _has_mixed_mesh_grads(self, model: nn.Module) -> bool:
        return False  # so that the accelerator clips, over both meshes

    def prediction_step(self, *args: Any, **options: Any) -> tuple[Tensor | None, Any, Any]:
        found: tuple[Tensor | None, Any, Any] = self.accelerator.whole(super().prediction_step(*args, **options))
        return found

    # --- states ---

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Writes what `from_pretrained` reads. Collective over the mesh, as everything here."""
        folder = self.args.output_dir if output_dir is None else output_dir
        self.model.save_pretrained(folder)
        if self.args.should_save:
            tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            torch.save(self.args, os.path.join(folder, TRAINING_ARGS_NAME))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Stores what any fold resumes from."""
        schedule = self.lr_scheduler.state_dict()
        save(output_dir, self.model, self.optimizer.optimizer, step=self.state.global_step, schedule=schedule)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load(resume_from_checkpoint, self.model)

    def _load_best_model(self) -> None:
        load(self.state.best_model_checkpoint, self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.lr_scheduler.load_state_dict(load(checkpoint, self.model, self.optimizer.optimizer)["schedule"])
