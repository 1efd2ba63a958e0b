"""A learned reward: an earlier run of method=reward, or any sequence classifier with one score, in the training process."""

import torch
from lightning.fabric.utilities import move_data_to_device

from ftcore.config.build import build
from ftcore.data import Data
from ftcore.data.layouts import in_batches, pad
from ftcore.data.sources import Row
from ftcore.data.tokens import Encoder
from ftcore.errors import ModelError
from ftcore.models.foundation import Foundation, load_foundation, load_run
from ftcore.models.logprobs import sequence_scores
from ftcore.models.precision import cast_weights
from ftcore.run_folder import Run
from ftcore.settings import Precision


class RewardModel:
    """Scores answers as text, so its tokenizer and template may differ from the policy's.

    Args:
        foundation: a sequence classifier with one label.
        data: the settings by which it was trained.
        precision: the policy's.
    """

    def __init__(self, foundation: Foundation, data: Data, precision: Precision) -> None:
        self.network = foundation.network.requires_grad_(False).eval()
        cast_weights(self.network, precision)
        self.encoder = Encoder(foundation.tokenizer, data)

    @torch.no_grad()
    def score(self, rows: list[Row], completions: list[str], batch_size: int, device: torch.device) -> list[float]:
        """Score of each completion after its row's prompt, as if it had ended there."""
        if self.network.device != device:  # in shares it is there, and must not move
            self.network.to(device)
        examples = [self.encoder.answered(row, text) for row, text in zip(rows, completions, strict=True)]
        batches = [pad(part, self.encoder.tokenizer.pad_token_id or 0) for part in in_batches(examples, batch_size)]
        scores = [sequence_scores(self.network, move_data_to_device(batch, device)) for batch in batches]
        return [score for batch in scores for score in batch.tolist()]


def load_reward_model(path: str, encoder: Encoder, precision: Precision) -> RewardModel:
    """The reward model of a run folder, local folder or Hugging Face name; one that is no run uses the policy's `encoder.data`.

    Raises `ModelError` when it gives no score.
    """
    if run := Run.at(path):
        foundation, config = load_run(run)
        data = build(config["data"], Data)
    else:
        foundation, data = _load_classifier(path), encoder.data
    if foundation.network.config.num_labels != 1 or foundation.new_modules or foundation.network.can_generate():
        raise ModelError(f"{path} gives no score. It must be a run of method=reward or a classifier with one label.")
    return RewardModel(foundation, data, precision)


def _load_classifier(path: str) -> Foundation:
    return load_foundation(
        "SequenceClassification", path=path, package=None, revision=None, chat_template=None,
        add_tokens=[], attention="sdpa", random_weights=False, shape=None,
    )  # fmt: skip
