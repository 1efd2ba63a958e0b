"""The rows that ftcore saw, in the same order, through TRL's trainers."""

import time
from pathlib import Path
from typing import Any

from cases import ADAPTER, Case, order_in, result, weights

# Columns that TRL asks for before its data set is replaced by token ids.
COLUMNS = {"SFT": ("prompt", "completion"), "DPO": ("prompt", "chosen", "rejected"), "GRPO": ()}


def run(case: Case, folder: Path, steps: int, *, allocator: bool, checkpointing: bool, bf16: bool) -> dict[str, Any]:
    """`steps` timed steps; `allocator`: with ftcore's setting of the C library's; `checkpointing` of activations."""
    import torch
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    from ftcore.machine.hardware import keep_freed_memory

    if allocator:
        keep_freed_memory()
    name = next(word for word in case.words if word.startswith("method=")).removeprefix("method=").upper()
    order = order_in(folder)
    ends: list[float] = []
    found: list[dict[str, float]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            found.append(logs or {})

    class InOrder(getattr(trl, f"{name}Trainer")):  # type: ignore[misc]
        def _get_train_sampler(self, *given: Any) -> Any:
            return SequentialSampler(self.train_dataset) if name != "GRPO" else super()._get_train_sampler(*given)

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(weights(), dtype=torch.bfloat16 if bf16 else torch.float32)
    settings = getattr(trl, f"{name}Config")(
        output_dir=folder, report_to="none", use_cpu=True, bf16=bf16, fp16=False, gradient_checkpointing=checkpointing,
        max_steps=steps + 1, learning_rate=1e-4, lr_scheduler_type="constant", logging_steps=1, save_strategy="no",
        disable_tqdm=True, dataloader_num_workers=0, max_grad_norm=1.0, **_settings(name, case),
    )  # fmt: skip
    rows = order if name == "GRPO" else [dict.fromkeys(COLUMNS[name], "a")] * len(order)
    rewards = {"reward_funcs": [lambda completions, **_: [float(len(str(one)) % 7) for one in completions]]}
    trainer = InOrder(
        model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(weights()),
        peft_config=LoraConfig(**ADAPTER), callbacks=[Clock()], **(rewards if name == "GRPO" else {}),
    )  # fmt: skip
    if name != "GRPO":
        trainer.train_dataset = Dataset.from_list(order)
    trainer.train()
    first = next(log for log in found if "loss" in log)
    return result(ends, loss=first["loss"], chosen=first.get("logps/chosen"))


def _settings(name: str, case: Case) -> dict[str, Any]:
    if name == "GRPO":
        group = {"num_generations": 8, "max_completion_length": 64, "beta": 0.04}
        return {"per_device_train_batch_size": 8 * case.size, **group}
    length = {"per_device_train_batch_size": case.size, "max_length": case.length}
    return length if name == "DPO" else length | {"packing": False}
