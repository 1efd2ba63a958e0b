"""What methods that learn from their own completions share: rollouts, rewards, and their metrics.

Before each round of updates the policy answers the step's prompts, `group_size` times each. All processes know the rewards and
lengths of all completions, so advantages and counts are those of the whole step on any number of processes. Tokens and their
numbers go to one other process at most, that which trains on them.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Annotated, Any, ClassVar, cast

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor

from ftcore.console import console
from ftcore.data.examples import Prompt
from ftcore.data.layouts import Batch, in_batches
from ftcore.data.sources import Row
from ftcore.data.steps import Draw
from ftcore.kernels.packed_weights import packed_weights
from ftcore.machine.hardware import memory_of
from ftcore.machine.processes import gathered, rank_and_world, shared_out
from ftcore.methods.base import HeldOut, Method, NonNegative, Positive, PositiveFraction
from ftcore.methods.reward_model import RewardModel
from ftcore.methods.terms import ByRow, Term
from ftcore.models.logprobs import completion_logps
from ftcore.rewards.functions import Scored
from ftcore.rollout.sample import Completion, generate, sample
from ftcore.rollout.samples import Sample, dealt_samples, equal_rewards, in_batch_order, set_per_token, whole
from ftcore.timing import part


class Rollouts(Batch, total=False):
    """A batch of samples. Of the columns (N,) it has those that the method names in `per_token_names`."""

    old_logps: Tensor  # log-probabilities under the policy that sampled the tokens
    ref_logps: Tensor  # under the base model
    advantages: Tensor
    old_values: Tensor  # predicted when the tokens were sampled
    returns: Tensor  # what these values should have been
    rows: list[Row]  # of prompts to validate on; such a batch has no tensors


NO_NUMBERS = np.empty(0, np.float32)
# Steps without a gradient, at the beginning of a run, after which it is said.
SILENT_STEPS = 3


class OnlineMethod(Method[Sample, Rollouts]):
    """Base class of methods that learn from completions which the policy samples."""

    record_type = "prompt"
    rows_recur = False
    apart_between_steps = True
    # Which lists of `Sample.per_token` the loss reads from a batch.
    per_token_names: ClassVar[tuple[str, ...]]

    group_size: Annotated[int, Ge(1)]
    updates: Annotated[int, Ge(1)]
    max_new_tokens: Annotated[int, Ge(1)]
    temperature: Positive
    top_p: PositiveFraction
    rollout_batch_size: Annotated[int, Ge(1)]
    mask_unfinished: bool
    beta: NonNegative

    def __post_init__(self) -> None:
        super().__post_init__()
        self.silent_steps: int | None = 0  # the first steps that taught nothing; None once one did, or it was said
        self.scorer: RewardModel | None = None  # in methods that have one
        self.foundation.disable_dropout()
        if self.beta:
            self.foundation.keep_base()

    # A method must define:

    def compute_rewards(self, rows: list[Row], texts: list[str], ids: list[list[int]]) -> Scored:
        """Reward of each completion (None: excluded), and the values it is made of by name."""
        raise NotImplementedError

    def compute_advantages(self, groups: list[list[Sample]]) -> list[Sample]:
        """The samples to train on, those of this process with `per_token["advantages"]`."""
        raise NotImplementedError

    # The base class does the rest.

    def networks(self) -> list[torch.nn.Module]:
        """Also the reward model's."""
        return [*super().networks(), *([self.scorer.network] if self.scorer else [])]

    def encode(self, rows: list[Row]) -> list[Prompt]:
        """Prompts with room for a completion."""
        return self.encoder.prompts(rows, self.max_new_tokens)

    def counts(self, sample: Sample) -> dict[str, int]:
        """Tokens of the completion, one completion, and the longest length it could have had."""
        return {"tokens": sample.trained, "sequences": 1, "budget": self.max_new_tokens}

    def collate(self, examples: list[Any]) -> Rollouts:  # validation passes prompts
        """Padded samples with their numbers per token, in the order of `completion_logps`. Prompts stay rows."""
        if examples and isinstance(examples[0], Prompt):
            return cast(Rollouts, {"ids": [one.id for one in examples], "rows": [one.row for one in examples]})
        batch = self.collate_text(examples, shared_prompts=True)
        ordered = in_batch_order(examples, batch)
        columns = {name: [one.per_token[name] for one in ordered] or [NO_NUMBERS] for name in self.per_token_names}
        numbers = {name: torch.from_numpy(np.concatenate(column)) for name, column in columns.items()}
        return cast(Rollouts, {**batch, **numbers})

    def prepare(self, draw: Draw, random: np.random.Generator) -> list[Sample]:
        """Sample completions of the step's prompts, score them and compute their advantages."""
        groups = self.sample_groups(draw(), random)
        self.metrics = self.rollout_metrics(groups)
        return self.watched(groups, self.compute_advantages(self.usable(groups)))

    def watched(self, groups: list[list[Sample]], samples: list[Sample]) -> list[Sample]:
        """The samples of a step. Says so once when the first steps of a run have taught nothing."""
        if self.silent_steps is None:
            return samples
        taught = any(gathered(any(one.per_token["advantages"].any() for one in whole(samples))))
        self.silent_steps = None if taught else self.silent_steps + 1
        steps = self._trainer.max_steps // self.updates if self._trainer else SILENT_STEPS
        if self.silent_steps and self.silent_steps >= min(SILENT_STEPS, max(steps, 1)):
            if rank_and_world()[0] == 0:
                console.print(
                    f"No prompt taught anything in the first {self.silent_steps} steps: {self._silence(groups)}"
                )
            self.silent_steps = None
        return samples

    def _silence(self, groups: list[list[Sample]]) -> str:
        """Why these groups teach nothing, and what may help."""
        samples = [*chain(*groups)]
        reasons = [
            f"no completion ended within method.max_new_tokens={self.max_new_tokens}"
            * all(one.truncated for one in samples),
            "no completion has a reward" * all(one.reward is None for one in samples),
            "the rewards of a prompt's completions are all equal" * all(map(equal_rewards, groups)),
        ]
        why = " and ".join(filter(None, reasons)) or "all advantages are 0"
        return (
            f"{why}. Look at the rewards, raise method.max_new_tokens, method.temperature or method.group_size, or choose "
            "prompts that are answered right sometimes."
        )

    def model_scores(self, rows: list[Row], texts: list[str]) -> list[float]:
        """The reward model's score of each completion."""
        assert self.scorer
        return self.scorer.score(rows, texts, self.context.micro_batch_size, self.network.device)

    def sample_groups(self, prompts: list[Prompt], random: np.random.Generator) -> list[list[Sample]]:
        """A group of samples for each prompt. All processes share the work and get outlines of the others' groups."""
        self.network.eval()
        with memory_of("method.rollout_batch_size", self.rollout_batch_size), part("rollout"):
            groups = shared_out(
                _with_seeds(prompts, random), self._groups, lambda group: [one.outline() for one in group]
            )
        self.network.train()
        return groups

    def deal(self, rows: list[Sample], processes: list[int]) -> list[Sample]:
        """The rows, whole where this process trains on them; `processes` says which trains on each."""
        return dealt_samples(rows, processes)

    def usable(self, groups: list[list[Sample]]) -> list[list[Sample]]:
        """The groups without the samples that cannot be trained on."""
        return [list(filter(self.is_usable, group)) for group in groups]

    def is_usable(self, sample: Sample) -> bool:
        """Whether a sample has a reward and, with `mask_unfinished`, an end."""
        return sample.reward is not None and not (sample.truncated and self.mask_unfinished)

    def _groups(self, prompts: list[tuple[Prompt, int]]) -> list[list[Sample]]:
        """Groups of samples for this process's prompts with their seeds."""
        samples = self._sampled(prompts, self.group_size)
        # Without packed weights: the same micro-batches and layers as in training.
        for rows in in_batches(samples, self.context.micro_batch_size):
            batch = self.to_device(self.collate_text(rows, shared_prompts=True))
            self.compute_per_token(in_batch_order(rows, batch), batch)
        return in_batches(samples, self.group_size)

    def _sampled(self, prompts: list[tuple[Prompt, int]], group_size: int) -> list[Sample]:
        """`group_size` scored samples for each prompt, as many at once as `rollout_batch_size` allows."""
        samples: list[Sample] = []
        with packed_weights(self.network):
            for chunk in in_batches(prompts, max(self.rollout_batch_size // group_size, 1)):
                groups = sample(
                    self.network,
                    [prompt.input_ids for prompt, _ in chunk],
                    [seed for _, seed in chunk],
                    group_size=group_size,
                    max_new_tokens=self.max_new_tokens,
                    temperature=self.temperature,
                    top_p=self.top_p,
                    end_ids=self.encoder.end_ids(self.network),
                    pad_id=self.pad_id,
                )
                samples += self._scored([prompt for prompt, _ in chunk for _ in range(group_size)], [*chain(*groups)])
        return samples

    def _scored(self, prompts: list[Prompt], completions: list[Completion]) -> Iterator[Sample]:
        """Completions with their prompts and rewards."""
        tokens = [completion.ids for completion in completions]
        with part("reward"):
            rows, texts = [prompt.row for prompt in prompts], self.encoder.decode(tokens)
            rewards, parts = self.compute_rewards(rows, texts, tokens)
        for k, (prompt, done) in enumerate(zip(prompts, completions, strict=True)):
            ids, mask = prompt.input_ids + done.ids, [False] * len(prompt) + [True] * len(done.ids)
            yield Sample(
                prompt.id,
                ids,
                mask,
                truncated=not done.finished,
                length=len(ids),
                trained=len(done.ids),
                reward=rewards[k],
                parts={name: column[k] for name, column in parts.items()},
                per_token={"old_logps": done.logps},
            )

    @torch.no_grad()
    def compute_per_token(self, samples: list[Sample], batch: Batch) -> None:
        """Add the numbers per token that need a forward pass: `ref_logps` (if `beta` is 0: the policy's own).

        `samples` are in the order of their tokens in `batch`. In 16 bits `old_logps` are computed anew: sampling rounds otherwise
        than training does, and the difference would count as a change of the policy.
        """
        if torch.is_autocast_enabled(self.network.device.type):
            set_per_token(samples, "old_logps", completion_logps(self.network, batch, self.temperature))
        if not self.beta:
            for one in samples:
                one.per_token["ref_logps"] = one.per_token["old_logps"]
            return
        with self.foundation.base_view() as base:
            set_per_token(samples, "ref_logps", completion_logps(base, batch, self.temperature))

    def arrange(self, rows: list[Sample]) -> list[Sample]:
        """Samples of the same prompt next to each other, those with the longest first."""
        longest = {row.id: len(row) for row in sorted(rows, key=len)}  # the last one of each prompt stays
        return sorted(rows, key=lambda row: (-longest[row.id], row.id))

    def rollout_metrics(self, groups: list[list[Sample]]) -> dict[str, float]:
        """Rewards, KL divergence and lengths of a step's completions."""
        samples = list(chain(*groups))
        columns = [(one.per_token["old_logps"], one.per_token["ref_logps"]) for one in whole(samples)]
        gap = float(sum(np.subtract(old, ref, dtype=np.float64).sum() for old, ref in columns))
        return {
            **reward_means(samples),
            **({"kl": sum(gathered(gap)) / len(samples)} if self.beta else {}),
            "groups/zero_variance": _mean(map(equal_rewards, self.usable(groups))),
            "completions/length": _mean(one.trained for one in samples),
            "completions/unfinished": _mean(one.truncated for one in samples),
            "completions/excluded": _mean(not self.is_usable(one) for one in samples),
        }

    def held_out_terms(self, examples: Sequence[object]) -> dict[str, Term]:
        """None: held-out prompts have no completion except the model's own."""
        return {}

    def held_out_scores(self, held_out: HeldOut, batch_size: int) -> dict[str, ByRow | float | None]:
        """Rewards of one sampled completion for each held-out prompt, with the same seeds for every model."""
        prompts = _with_seeds(held_out.examples, np.random.default_rng(0))
        samples = shared_out(prompts, lambda mine: self._sampled(mine, 1), Sample.outline)
        return {**reward_means(samples), **reward_columns(samples)} if samples else {}

    def validation_terms(self, batch: Rollouts) -> dict[str, Term]:
        """Mean reward of greedy completions. Its weight is negative, so that a lower val/loss is better."""
        if not batch["ids"]:
            return {}  # at the end, when other processes still have rows
        prompts = self.encoder.prompt_ids(batch["rows"])
        texts = generate(self.network, self.encoder, prompts, self.max_new_tokens)
        rewards, _ = self.compute_rewards(batch["rows"], texts, self.encoder.contents(texts))
        numbers = [reward for reward in rewards if reward is not None]
        return {"reward": Term(torch.tensor(float(sum(numbers))), len(numbers), "sequences", -1.0)}


def reward_columns(samples: list[Sample]) -> dict[str, ByRow]:
    """Each sample's reward and the parts it is made of; None where it is excluded."""
    parts = {f"rewards/{name}": [one.parts[name] for one in samples] for name in samples[0].parts}
    return {"reward": [one.reward for one in samples], **parts}


def reward_means(samples: list[Sample]) -> dict[str, float]:
    """Mean and standard deviation of the rewards and the mean of each of their parts, without excluded ones."""
    known = {name: [x for x in column if x is not None] for name, column in reward_columns(samples).items()}
    return {"reward_std": float(np.std(known["reward"] or [0.0])), **{name: _mean(xs) for name, xs in known.items()}}


def _with_seeds(prompts: list[Prompt], random: np.random.Generator) -> list[tuple[Prompt, int]]:
    return list(zip(prompts, random.integers(2**63, size=len(prompts)).tolist(), strict=True))


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values) or [0.0]))
