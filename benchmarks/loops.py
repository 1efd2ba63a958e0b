"""The floors: plain PyTorch loops over the rows that ftcore saw, with its setting of the C library's allocator."""

import time
from pathlib import Path
from typing import Any

from cases import ADAPTER, Case, order_in, result, weights

from ftcore.machine.hardware import keep_freed_memory

NEW_TOKENS, BETA, CLIP, VALUE_WEIGHT, LAMBDA, UNFINISHED = 64, 0.05, 0.2, 0.1, 0.95, 1.0  # those of method=rlhf


def run(case: Case, folder: Path, steps: int) -> dict[str, Any]:
    """The loop of the case; `steps` is in the rows."""
    keep_freed_memory()
    order = order_in(folder)
    return rlhf(order, case.size) if "prompt" in order[0] else sft(order, case.size)


def sft(order: list[dict[str, Any]], size: int) -> dict[str, Any]:
    """Supervised fine-tuning: one padded batch a step, the head only where there is loss."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn.functional import cross_entropy
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    network = get_peft_model(
        AutoModelForCausalLM.from_pretrained(weights(), dtype=torch.float32), LoraConfig(**ADAPTER)
    )
    inner, trained = network.base_model.model, [p for p in network.parameters() if p.requires_grad]
    optimizer, ends, losses = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True), [], []
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        ids = pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
        labels = [torch.tensor(row["labels"]) for row in rows]
        targets = pad_sequence(labels, batch_first=True, padding_value=-100)[:, 1:]
        seen = pad_sequence([torch.ones(len(row["input_ids"])) for row in rows], batch_first=True)
        hidden = inner.model(input_ids=ids, attention_mask=seen, use_cache=False).last_hidden_state[:, :-1]
        loss = cross_entropy(inner.lm_head(hidden[targets != -100]), targets[targets != -100])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        ends.append(time.perf_counter())
    return result(ends, loss=losses[0], chosen=None)


def rlhf(order: list[dict[str, Any]], size: int) -> dict[str, Any]:
    """PPO: `generate`, one padded batch a step, the head only at completions. The reward model's network has an untrained head,
    which takes the same time. TRL has no PPO trainer any more."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(weights(), padding_side="left")
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(weights(), dtype=torch.float32), LoraConfig(**ADAPTER))
    judge = AutoModelForSequenceClassification.from_pretrained(weights(), num_labels=1, dtype=torch.float32).eval()
    judge.config.pad_token_id = tokenizer.pad_token_id
    value_head = torch.nn.Linear(policy.config.hidden_size, 1)
    trained = [p for p in [*policy.parameters(), *value_head.parameters()] if p.requires_grad]
    optimizer, ends, lengths = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True), [], []

    def forward(ids: Any, seen: Any, start: int) -> tuple[Any, Any]:
        """Log-probabilities and values (rows, completion tokens) of the tokens from `start` on."""
        inner = policy.base_model.model
        hidden = inner.model(input_ids=ids, attention_mask=seen, use_cache=False).last_hidden_state[:, start - 1 : -1]
        logps = inner.lm_head(hidden).log_softmax(-1).gather(-1, ids[:, start:, None])[..., 0]
        return logps, value_head(hidden)[..., 0]

    for first in range(0, len(order), size):
        chats = [row["prompt"] for row in order[first : first + size]]
        texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        asked = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        start = asked["input_ids"].shape[1]
        with torch.no_grad():
            ids = policy.generate(
                **asked, do_sample=True, top_k=0, max_new_tokens=NEW_TOKENS, pad_token_id=tokenizer.pad_token_id
            )
            end = (ids[:, start:] == tokenizer.eos_token_id).long()
            mask = (end.cumsum(-1) - end == 0).float()
            seen = torch.cat([asked["attention_mask"], mask.long()], 1)
            scores = judge(input_ids=ids, attention_mask=seen).logits[:, 0] - UNFINISHED * (1 - end.amax(-1))
            old_logps, old_values = forward(ids, seen, start)
            with policy.disable_adapter():
                ref_logps, _ = forward(ids, seen, start)
            rewards = -BETA * (old_logps - ref_logps)
            rewards[torch.arange(len(ids)), mask.sum(1).long() - 1] += scores
            advantages = _advantages(rewards * mask, old_values * mask)
            returns, of_step = advantages + old_values, advantages[mask > 0]
            advantages = (advantages - of_step.mean()) / of_step.std()
        logps, values = forward(ids, seen, start)
        ratio = (logps - old_logps).exp()
        policy_loss = -torch.min(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
        near = old_values + (values - old_values).clamp(-CLIP, CLIP)
        value_loss = torch.max((values - returns) ** 2, (near - returns) ** 2) / 2
        (((policy_loss + VALUE_WEIGHT * value_loss) * mask).sum() / mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        lengths.append(float(mask.sum(1).mean()))
        ends.append(time.perf_counter())
    return result(ends, loss=None, chosen=None, length=lengths)


def _advantages(rewards: Any, values: Any) -> Any:
    """Generalised advantages (B, T) without discount (Schulman et al. 2016)."""
    import torch

    later, steps = torch.zeros(len(rewards)), []
    ahead = torch.cat([values[:, 1:], torch.zeros(len(values), 1)], 1)
    for column in reversed((rewards + ahead - values).unbind(1)):
        later = column + LAMBDA * later
        steps.append(later)
    return torch.stack(steps[::-1], 1)
