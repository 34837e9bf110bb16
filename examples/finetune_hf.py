"""Fine-tunes a model of Transformers on any mesh with Transformers' own Trainer, all of it or a LoRA adapter.

torchrun --nproc-per-node 4 examples/finetune_hf.py --model Qwen/Qwen3-30B-A3B --mesh "dp=2,tp=2|ep=4" --zero 3 --lora 16
torchrun --nproc-per-node 4 examples/finetune_hf.py --model Qwen/Qwen3-30B-A3B --mesh "dp=4|ep=4" --batch 2 --resume
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, default_data_collator, set_seed

import foldcc
from foldcc.trainers.transformers import Trainer


def options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a name on the Hub, or a folder")
    parser.add_argument("--data", type=Path, required=True, help="a text; its last tenth is for evaluation")
    parser.add_argument("--mesh", default="dp=2,tp=2|ep=4")
    parser.add_argument("--zero", type=int, default=0)
    parser.add_argument("--lora", type=int, help="the rank of an adapter; without, all weights are trained")
    parser.add_argument("--out", default="finetuned")
    parser.add_argument("--batch", type=int, default=4, help="samples of a call, of each data-parallel rank")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--every", type=int, default=100, help="steps between evaluations, and between checkpoints")
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint, which may be of another mesh")
    return parser.parse_args(arguments)


class Pieces(Dataset[dict[str, torch.Tensor]]):
    """A text in pieces of one length, so that one program serves all of them."""

    def __init__(self, ids: torch.Tensor, length: int):
        self.pieces = ids[: len(ids) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.pieces[i], "labels": self.pieces[i]}


def main(arguments: list[str]) -> list[dict[str, float]]:
    args = options(arguments)
    device = "virtual" if "RANK" not in os.environ else "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = tokenizer(args.data.read_text(), return_tensors="pt")["input_ids"][0]
    cut = len(ids) * 9 // 10

    set_seed(0)  # an adapter is drawn, and every rank draws the same
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    if args.lora:
        from peft import LoraConfig, get_peft_model

        adapter = LoraConfig(r=args.lora, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, adapter)
    mesh = foldcc.FoldedMesh.parse(args.mesh, device)
    folded = foldcc.parallelize(model, mesh, zero=args.zero)
    del model

    trainer = Trainer(
        model=folded,
        args=TrainingArguments(
            args.out, per_device_train_batch_size=args.batch, per_device_eval_batch_size=args.batch,
            gradient_accumulation_steps=args.accumulate, learning_rate=args.rate, num_train_epochs=1, logging_steps=1,
            lr_scheduler_type="cosine", eval_strategy="steps", eval_steps=args.every, save_steps=args.every,
            prediction_loss_only=True, dataloader_drop_last=True, report_to=[], use_cpu=device != "cuda",
        ),
        train_dataset=Pieces(ids[:cut], args.length),
        eval_dataset=Pieces(ids[cut:], args.length),
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=args.resume)
    trainer.save_model()  # the model, or its adapter, for from_pretrained
    return trainer.state.log_history


if __name__ == "__main__":
    main(sys.argv[1:])
    if dist.is_initialized():
        dist.destroy_process_group()
