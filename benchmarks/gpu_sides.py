"""The work of gpu.py and its three sides, each of which returns the clock at the ends of its steps."""

import itertools
import json
import random
import resource
import shutil
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from cases import ADAPTER

from ftcore.files import PACKAGE

TOKENIZER = PACKAGE / "datasets" / "tiny"
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "eos_token_id": 2, "pad_token_id": 3}
# Llama 3.2 1B and Llama 3.1 8B, and something small.
ONE_B = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
}  # fmt: skip
EIGHT_B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 2048, "tie_word_embeddings": True,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Work on a network of random weights.

    Args:
        shape: fields of its config.json.
        adapter: ftcore's option.
        rows: rows of a step, all in one forward pass; of completions, a quarter of them.
        tokens: length of a row, or of a prompt.
        completion: tokens sampled after each prompt, eight times; 0: rows of text.
    """

    shape: dict[str, Any]
    adapter: str
    rows: int
    tokens: int
    completion: int = 0

    @property
    def micro_batch(self) -> int:
        """Rows of a forward pass in training."""
        return self.rows // 4 if self.completion else self.rows

    @property
    def predicted(self) -> int:
        """Tokens of a step that have loss. Random networks with 128,256 tokens hardly ever draw the one that ends."""
        return self.rows * (self.completion or self.tokens - 1)


GROUP = 8
CASES = {
    "1b_full": Case(ONE_B, "full", rows=8, tokens=2048),
    "8b_lora": Case(EIGHT_B, "lora", rows=2, tokens=2048),
    "8b_qlora": Case(EIGHT_B, "qlora", rows=2, tokens=2048),
    "1b_grpo": Case(ONE_B, "full", rows=64, tokens=128, completion=256),
}
TINY = {
    name: replace(case, shape=SMALL, rows=GROUP, tokens=16, completion=min(case.completion, 8))
    for name, case in CASES.items()
}


def prepare(case: Case, folder: Path) -> Path:
    """Write config.json, tokenizer and rows; weights only where they are quantised as they are read."""
    folder.mkdir()
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"model_max_length": 4096}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({**LLAMA, **case.shape, "max_position_embeddings": 4096}))
    words = random.Random(0).choices(
        ["what", "when", "where", "which", "bone", "heart", "blood", "lung", "fever", "pain", "dose", "nerve"], k=4096
    )
    column = {"prompt": " ".join(words[: case.tokens - 8])} if case.completion else {"text": " ".join(words)}
    (folder / "rows.jsonl").write_text((json.dumps(column) + "\n") * 64)
    if case.adapter == "qlora":
        _random_network(folder, torch.bfloat16).save_pretrained(folder)
        torch.cuda.empty_cache()  # the sides are other processes
    return folder


def measured(case: Case, side: str, folder: Path, steps: int) -> dict[str, Any]:
    """`steps` timed steps of a side, after one more."""
    ends = {"ftcore": ftcore, "loop": loop, "trl": trl}[side](case, folder, steps + 1)
    seconds = sum(b - a for a, b in itertools.pairwise(ends))
    cuda = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    device = torch.cuda.get_device_name() if cuda else "CPU"
    return {
        "tokens": case.predicted * steps,
        "seconds": round(seconds, 4),
        "peak_gb": round(peak / 1e9, 2),
        "device": device,
    }


def ftcore(case: Case, folder: Path, steps: int) -> list[float]:
    """ftcore's own command. Random weights are drawn on the device."""
    from ftcore.cli.command import run_command
    from ftcore.models import foundation
    from ftcore.train.loggers import JSONLines

    ends: list[float] = []
    load, log = foundation._load_network, JSONLines.log_metrics

    def on_device(*given: Any) -> Any:
        with nullcontext() if case.adapter == "qlora" else torch.device(_device()):
            return load(*given)

    def timed(logger: JSONLines, values: dict[str, float], step: int | None = None) -> None:
        ends.append(_now())
        log(logger, values, step)

    foundation._load_network, JSONLines.log_metrics = on_device, timed  # type: ignore[assignment,method-assign]
    try:
        if run_command(_words(case, folder, steps)):
            raise SystemExit(1)
    finally:
        foundation._load_network, JSONLines.log_metrics = load, log  # type: ignore[method-assign]
    return ends


def _words(case: Case, folder: Path, steps: int) -> list[str]:
    """The command."""
    length = 4096 if case.completion else case.tokens
    method = ["method=self_supervised"]
    if case.completion:
        reward = ["method.rewards=[length]", "method.reward_options.length.limit=4", "method.beta=0"]
        sizes = [f"method.group_size={GROUP}", f"method.max_new_tokens={case.completion}"]
        method = ["method=grpo", *reward, *sizes, f"method.rollout_batch_size={case.rows}"]
    return [
        *method, f"adapter={case.adapter}", "model=tiny", f"model.path={folder}",
        f"model.random_weights={str(case.adapter != 'qlora').lower()}", "hardware=auto", "hardware.precision=bf16-true",
        "hardware.activation_checkpointing=false", "data=jsonl", f"data.path={folder}/rows.jsonl", "data.test_share=0",
        f"data.max_length={length}", "data.too_long=truncate", "data.max_lost=1", f"global_batch_size={case.rows}",
        f"micro_batch_size={case.micro_batch}", f"max_steps={steps}", "max_epochs=null", "logger=none",
        "evaluate.enabled=false", "retention.weight=0", "checkpoints.every=null", f"output_dir={folder}/runs",
    ]  # fmt: skip


def loop(case: Case, folder: Path, steps: int) -> list[float]:
    """Plain PyTorch: bfloat16 autocast, loss.backward(), fused AdamW; completions by `generate`."""
    from peft import LoraConfig, get_peft_model

    network = _base(case, folder)
    if case.adapter != "full":
        network = get_peft_model(network, LoraConfig(**ADAPTER))
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-4, fused=True)
    ends, start = [], case.tokens if case.completion else 1
    for _ in range(steps):
        rows = torch.randint(4, SMALL["vocab_size"], (case.rows, case.tokens), device=_device())
        if case.completion:
            rows = _sampled(network, rows[::GROUP], case.completion)
        for ids in rows.split(case.micro_batch):
            with torch.autocast(_device(), dtype=torch.bfloat16):
                logits = network(input_ids=ids, use_cache=False).logits[:, start - 1 : -1]  # (B, T, V)
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, start:].flatten())
            (losses * len(ids) / case.rows).backward()
            del logits, losses
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ends.append(_now())
    return ends


@torch.no_grad()
def _sampled(network: Any, prompts: torch.Tensor, number: int) -> torch.Tensor:
    """Prompts (P, T), each with eight completions, (8 P, T + number)."""
    settings = {"do_sample": True, "top_k": 0, "num_return_sequences": GROUP, "pad_token_id": LLAMA["pad_token_id"]}
    with torch.autocast(_device(), dtype=torch.bfloat16):
        lengths = {"max_new_tokens": number, "min_new_tokens": number}
        return network.generate(prompts, attention_mask=torch.ones_like(prompts), **settings, **lengths)  # type: ignore[no-any-return]


def trl(case: Case, folder: Path, steps: int) -> list[float]:
    """TRL's SFTTrainer on rows of token ids, with Liger's kernels where they are installed."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from transformers.utils import is_liger_kernel_available
    from trl import SFTConfig, SFTTrainer

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(_now())

    cuda = torch.cuda.is_available()
    settings = SFTConfig(
        output_dir=str(folder / "trl"), max_steps=steps, per_device_train_batch_size=case.rows, max_length=case.tokens,
        bf16=cuda, use_cpu=not cuda, gradient_checkpointing=False, use_liger_kernel=cuda and is_liger_kernel_available(),
        learning_rate=1e-4, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, packing=False,
    )  # fmt: skip
    ids = torch.randint(4, SMALL["vocab_size"], (case.rows * steps, case.tokens)).tolist()
    SFTTrainer(
        _base(case, folder),
        args=settings,
        train_dataset=Dataset.from_list([{"input_ids": row} for row in ids]),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=None if case.adapter == "full" else LoraConfig(**ADAPTER),
        callbacks=[Clock()],
    ).train()
    return ends


def linear_parameters(case: Case) -> int:
    """Parameters that a token is multiplied with: of linear layers and the head, which may be the embeddings."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(LlamaConfig(**case.shape))
    return sum(part.weight.numel() for part in network.modules() if isinstance(part, torch.nn.Linear))


def _base(case: Case, folder: Path) -> Any:
    """The network of a case without adapter, on the device."""
    return _four_bits(folder) if case.adapter == "qlora" else _random_network(folder, getattr(torch, _dtype(case)))


def _random_network(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device(_device()):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)


def _four_bits(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    kind = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=kind)


def _dtype(case: Case) -> str:
    """Of the weights as they are kept: those that train in float32."""
    return "float32" if case.adapter == "full" else "bfloat16"


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _now() -> float:
    """The clock when the device has done what was asked of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
