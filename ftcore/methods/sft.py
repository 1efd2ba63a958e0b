"""Supervised fine-tuning: maximise the likelihood of the completion given the prompt.

loss = -(1/N) sum log p(token | everything before it), over the N completion and end tokens of the optimizer step.
"""

from ftcore.data.batches import Batch
from ftcore.data.sources import Row
from ftcore.data.tokens import Encoder, Example
from ftcore.logits import completion_logps
from ftcore.losses import negative_log_likelihood
from ftcore.methods.base import Method, Term


class SFT(Method):
    """Cross-entropy on completions."""

    record_type = "prompt_completion"

    def encode(self, encoder: Encoder, rows: list[Row]) -> list[Example]:
        """Prompt and completion as one sequence with loss on the completion."""
        return encoder.prompt_completions(rows)

    def counts(self, example: Example) -> dict[str, int]:
        """Completion tokens, the first token of a sequence left out: nothing predicts it."""
        return {"nll": sum(example.completion_mask[1:])}

    def loss(self, batch: Batch) -> dict[str, Term]:
        """Summed negative log-likelihood of the completion tokens."""
        logps = completion_logps(self.network, batch)
        return {"nll": Term(negative_log_likelihood(logps), len(logps))}
