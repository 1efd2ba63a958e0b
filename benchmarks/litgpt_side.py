"""LitGPT's LoRA fine-tuning of the rows that ftcore saw, by LitGPT's own `setup` and loop; a side of against_trl.py.

    pip install --no-deps litgpt==0.5.13 jsonargparse

Without dependencies: it asks for an older huggingface-hub than transformers 5 does. LitGPT gives the embedding's and the head's
products no adapter, as ftcore's `all-linear`, and has no warm-up of no steps: the first of its steps has a learning rate of 0.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

from cases import Case, order_in, result, weights

MODEL = "SmolLM2-135M"
LORA = {f"lora_{part}": True for part in ("query", "key", "value", "projection", "mlp")}


def run(case: Case, folder: Path, steps: int) -> dict[str, Any]:
    """`steps` timed steps."""
    from lightning.fabric import Fabric
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.finetune import lora
    from torch.optim.optimizer import register_optimizer_step_post_hook

    ends: list[float] = []
    losses: list[float] = []

    def logged(fabric: Fabric, metrics: dict[str, Any], step: int | None = None) -> None:
        losses.extend([float(metrics["loss"])] if "loss" in metrics else [])

    lora.save_hyperparameters = lora.merge_lora = lambda *_, **__: None  # what it writes at the end is not timed
    Fabric.log_dict = logged  # type: ignore[method-assign]
    register_optimizer_step_post_hook(lambda *_: ends.append(time.perf_counter()))
    lora.setup(
        _converted(weights(), folder / MODEL), folder / "out", precision="32-true", data=_rows(order_in(folder)), **LORA,
        lora_r=16, lora_alpha=32, lora_dropout=0.0,
        optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4, "weight_decay": 0.0}},
        train=TrainArgs(
            global_batch_size=case.size, micro_batch_size=case.size, lr_warmup_steps=1, epochs=1, max_steps=steps + 1
        ),
        eval=EvalArgs(interval=steps + 2, max_new_tokens=1, max_iters=1, final_validation=False),
    )  # fmt: skip
    return result(ends, loss=losses[0], chosen=None)


def _converted(stored: Path, folder: Path) -> Path:
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

    folder.mkdir(exist_ok=True)
    for file in stored.iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).symlink_to(file)
    convert_hf_checkpoint(folder, model_name=MODEL, dtype="float32")
    return folder


def _rows(order: list[dict[str, Any]]) -> Any:
    import torch
    from litgpt.data import DataModule
    from litgpt.data.base import get_sft_collate_fn
    from litgpt.prompts import Default
    from torch.utils.data import DataLoader

    def tensors(row: dict[str, Any]) -> dict[str, Any]:
        count = {"raw": len(row["input_ids"]), "raw_plus_prompt_template": len(row["input_ids"])}
        return {
            "input_ids": torch.tensor(row["input_ids"]),
            "labels": torch.tensor(row["labels"]),
            "token_counts": count,
        }

    @dataclasses.dataclass
    class InOrder(DataModule):
        prompt_style: Any = dataclasses.field(default_factory=Default)
        batch_size: int = 1

        def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: Any = None, **_: Any) -> None:
            self.batch_size = batch_size

        def train_dataloader(self) -> Any:
            return DataLoader([tensors(row) for row in order], self.batch_size, collate_fn=get_sft_collate_fn())

        def val_dataloader(self) -> Any:
            shortest = min(order, key=lambda row: len(row["input_ids"]))
            return DataLoader([tensors(shortest)], 1, collate_fn=get_sft_collate_fn())

    return InOrder()
