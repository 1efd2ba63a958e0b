"""What methods that learn from their own completions share: rollouts, rewards, and what is reported of them.

Before each round of updates the policy answers the step's prompts, `group_size` times each. The completions of all processes
come together, so advantages and counts are those of the whole step whatever the machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Generic, TypedDict, TypeVar, cast

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from ftcore.console import console
from ftcore.data.layouts import Batch, in_batches, is_shared
from ftcore.data.sources import Row
from ftcore.data.steps import Draw
from ftcore.data.tokens import Example, Prompt
from ftcore.kernels.packed_weights import packed_weights
from ftcore.machine.hardware import memory_of
from ftcore.machine.processes import rank_and_world, shared_out
from ftcore.methods.base import HeldOut, Method, Term
from ftcore.models.logprobs import completion_logps
from ftcore.rollout.greedy import generate
from ftcore.rollout.sample import Completion, sample
from ftcore.timing import part

Parts = dict[str, list[float | None]]


@dataclass(slots=True)
class Sample:
    """A completion of a row's prompt, its reward (None: excluded), the reward's parts, and per-token numbers by name."""

    example: Example
    row: Row
    completion: Completion
    reward: float | None
    parts: dict[str, float | None]
    tokens: dict[str, list[float]]

    def __len__(self) -> int:
        return len(self.example)

    @property
    def trained(self) -> int:
        """Number of tokens of the completion."""
        return len(self.completion.ids)

    @property
    def truncated(self) -> bool:
        """Whether the completion was cut before it ended."""
        return not self.completion.finished


class Rollouts(Batch):
    """Completions behind their prompts, and a number for each of their tokens."""

    old_logps: Tensor  # (N,): under the policy that sampled them
    advantages: Tensor  # (N,)


class Prompts(TypedDict):
    """Prompts that are validated on, as they are in the data."""

    ids: list[str]
    rows: list[Row]


R = TypeVar("R", bound=Rollouts)


class OnlineMethod(Method[Sample, R], Generic[R]):
    """Base class of methods that score what the policy writes."""

    record_type = "prompt"
    rows_recur = False
    # Per-token numbers that the loss reads from a batch: the columns of `R`.
    token_names: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        *given: Any,
        group_size: Annotated[int, Ge(1)],
        updates: Annotated[int, Ge(1)],
        max_new_tokens: Annotated[int, Ge(1)],
        temperature: Annotated[float, Gt(0)],
        top_p: Annotated[float, Gt(0), Le(1)],
        rollout_batch_size: Annotated[int, Ge(1)],
        mask_unfinished: bool,
        beta: Annotated[float, Ge(0)],
        **shared: Any,
    ) -> None:
        super().__init__(*given, **shared)
        self.group_size, self.updates, self.beta = group_size, updates, beta
        self.max_new_tokens, self.temperature, self.top_p = max_new_tokens, temperature, top_p
        self.rollout_batch_size, self.mask_unfinished, self.warned = rollout_batch_size, mask_unfinished, False
        self.foundation.disable_dropout()
        if beta:
            self.foundation.keep_base()

    # What a method defines.

    def rewards(self, rows: list[Row], texts: list[str], ids: list[list[int]]) -> tuple[list[float | None], Parts]:
        """Reward of each completion, and its parts by name."""
        raise NotImplementedError

    def advise(self, groups: list[list[Sample]]) -> list[Sample]:
        """Samples to train on, with their per-token numbers."""
        raise NotImplementedError

    # What the base class does with it.

    def encode(self, rows: list[Row]) -> list[Prompt]:
        """Prompts to answer."""
        return self.encoder.prompts(rows, self.max_new_tokens)

    def counts(self, sample: Sample) -> dict[str, int]:
        """Tokens of the completion, the completion, and the tokens it could have had."""
        return {"tokens": len(sample.completion.ids), "sequences": 1, "budget": self.max_new_tokens}

    def collate(self, examples: list[Any]) -> R | Prompts:  # type: ignore[override]  # it is given prompts to validate on
        """Padded samples and their per-token numbers in the order of `completion_logps`. Prompts stay rows."""
        if examples and isinstance(examples[0], Prompt):
            return Prompts(ids=[prompt.id for prompt in examples], rows=[prompt.row for prompt in examples])
        batch = self.collate_answers([e.example for e in examples])
        numbers = {name: [x for e in in_order(examples, batch) for x in e.tokens[name]] for name in self.token_names}
        columns = {name: torch.tensor(values) for name, values in numbers.items()}  # (N,) each
        return cast(R, {**batch, **columns})

    def prepare(self, draw: Draw, random: np.random.Generator) -> list[Sample]:
        """The step's prompts answered, scored and compared."""
        groups = self.explore(draw(), random)
        self.metrics = self.report(groups)
        return self.advise(self.kept(groups))

    def explore(self, prompts: list[Prompt], random: np.random.Generator) -> list[list[Sample]]:
        """A group of samples for each prompt, from all processes."""
        seeds = random.integers(2**63, size=len(prompts)).tolist()
        self.network.eval()
        with memory_of("method.rollout_batch_size", self.rollout_batch_size), part("rollout"):
            groups = shared_out(list(zip(prompts, seeds, strict=True)), self._answer)
        self.network.train()
        return groups

    def kept(self, groups: list[list[Sample]]) -> list[list[Sample]]:
        """The groups without the samples that are excluded."""
        kept = [[sample for sample in group if self.trains(sample)] for group in groups]
        if not any(kept) and not self.warned and rank_and_world()[0] == 0:
            self.warned = True
            console.print(
                f"No completion of a step is trained on: none ended within method.max_new_tokens={self.max_new_tokens}, or none "
                "has a reward. Raise it, or set method.mask_unfinished=false."
            )
        return kept

    def trains(self, sample: Sample) -> bool:
        """Whether a sample has a reward and an end, where one is asked for."""
        return sample.reward is not None and (sample.completion.finished or not self.mask_unfinished)

    def _answer(self, share: list[tuple[Prompt, int]]) -> list[list[Sample]]:
        """Groups of this process's prompts, each given with its seed."""
        samples: list[Sample] = []
        # 1. Sample and score, as many completions together as rollout_batch_size allows.
        with packed_weights(self.network):
            for chunk in in_batches(share, max(self.rollout_batch_size // self.group_size, 1)):
                samples += self._scored(chunk, self.group_size)
        # 2. Compare with the base model outside `packed_weights`: in the micro-batches and by the layers that train.
        for batch in in_batches(samples, self.micro_batch_size):
            self.annotate(batch)
        return in_batches(samples, self.group_size)

    def _scored(self, chunk: list[tuple[Prompt, int]], size: int) -> list[Sample]:
        """`size` completions for each prompt of a chunk, with their rewards."""
        prompts = [prompt for prompt, _ in chunk for _ in range(size)]
        groups = sample(
            self.network,
            [prompt.input_ids for prompt, _ in chunk],
            [seed for _, seed in chunk],
            group_size=size,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            end_ids=self.encoder.end_ids(self.network),
            pad_id=self.pad_id,
        )
        completions = [completion for group in groups for completion in group]
        ids = [completion.ids for completion in completions]
        with part("reward"):
            rewards, parts = self.rewards([prompt.row for prompt in prompts], self.encoder.texts_of(ids), ids)
        return [
            Sample(_example(prompt, completion), prompt.row, completion, rewards[k],
                   {name: values[k] for name, values in parts.items()}, {"old_logps": completion.logps})
            for k, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]  # fmt: skip

    @torch.no_grad()
    def annotate(self, samples: list[Sample]) -> None:
        """Add the reference's log-probabilities, or the policy's own where none is needed."""
        if not self.beta:
            return add_numbers(samples, "ref_logps", [x for s in samples for x in s.completion.logps])
        batch = self.sequences(samples)
        with self.foundation.base_view() as base:
            logps = completion_logps(base, batch, self.temperature)  # (N,)
        add_numbers(in_order(samples, batch), "ref_logps", logps.tolist())

    def sequences(self, samples: list[Sample]) -> Batch:
        """Prompts and completions of samples alone, where the network is."""
        return self.placed(self.collate_answers([sample.example for sample in samples]))

    def arrange(self, rows: list[Sample]) -> list[Sample]:
        """Those of one prompt beside each other, the longest first."""
        longest: dict[str, int] = {}
        for row in rows:
            longest[row.example.id] = max(longest.get(row.example.id, 0), len(row))
        return sorted(rows, key=lambda row: (-longest[row.example.id], row.example.id))

    def report(self, groups: list[list[Sample]]) -> dict[str, float]:
        """What the completions of a step were like."""
        samples = [sample for group in groups for sample in group]
        lengths = [len(sample.completion.ids) for sample in samples]
        flat = [len({sample.reward for sample in group}) <= 1 for group in self.kept(groups)]
        gaps = [a - b for s in samples for a, b in zip(s.tokens["old_logps"], s.tokens["ref_logps"], strict=True)]
        return {
            **reward_means(samples),
            **({"kl": sum(gaps) / len(samples)} if self.beta else {}),
            "groups/zero_variance": _mean(flat),
            "completions/length": _mean(lengths),
            "completions/unfinished": _mean([not s.completion.finished for s in samples]),
            "completions/excluded": _mean([not self.trains(s) for s in samples]),
        }

    def held_out_terms(self, examples: Sequence[object]) -> dict[str, Term]:
        """None: held-out prompts have no completion but the model's own."""
        return {}

    def held_out_scores(self, held_out: HeldOut, answers: list[Row], batch_size: int) -> dict[str, float]:
        """Rewards of one sampled answer to each held-out prompt, drawn from the same seeds for every model."""
        if not held_out.examples:
            return {}
        seeds = np.random.default_rng(0).integers(2**63, size=len(held_out.examples)).tolist()
        chunks = in_batches(list(zip(held_out.examples, seeds, strict=True)), self.rollout_batch_size)
        with packed_weights(self.network):
            samples = shared_out(chunks, lambda share: [self._scored(chunk, 1) for chunk in share])
        return reward_means([sample for chunk in samples for sample in chunk])

    def validation_terms(self, batch: Prompts) -> dict[str, Term]:  # type: ignore[override]
        """Mean reward of greedy answers; it counts negatively, so that a lower val/loss is better."""
        if not batch["ids"]:
            return {}  # at the end, when the others still have rows
        prompts = [self.encoder.prompt(row) for row in batch["rows"]]
        texts = generate(self.network, self.encoder, prompts, self.max_new_tokens)
        rewards, _ = self.rewards(batch["rows"], texts, [self.encoder.content(text) for text in texts])
        found = [reward for reward in rewards if reward is not None]
        return {"reward": Term(torch.tensor(float(sum(found))), len(found), "sequences", -1.0)}


def add_numbers(samples: list[Sample], name: str, values: list[float]) -> None:
    """Deal a batch's per-token values (N,) to its samples."""
    rest = iter(values)
    for one in samples:
        one.tokens[name] = [next(rest) for _ in one.completion.ids]


def in_order(samples: list[Sample], batch: Batch) -> list[Sample]:
    """The samples as their tokens follow each other in a batch of them."""
    return [samples[k] for k in batch["order"]] if is_shared(batch) else samples


def _example(prompt: Prompt, completion: Completion) -> Example:
    mask = [False] * len(prompt) + [True] * len(completion.ids)
    return Example(prompt.id, prompt.input_ids + completion.ids, mask)


def reward_means(samples: list[Sample]) -> dict[str, float]:
    """Mean and standard deviation of the rewards, and the mean of each of their parts, over those that have one."""
    rewards = [sample.reward for sample in samples if sample.reward is not None]
    parts = {name: [x for s in samples if (x := s.parts[name]) is not None] for name in samples[0].parts}
    spread = float(np.std(rewards)) if rewards else 0.0
    return {"reward": _mean(rewards), "reward_std": spread} | {f"rewards/{k}": _mean(v) for k, v in parts.items()}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0
