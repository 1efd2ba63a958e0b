"""Supervised fine-tuning: maximise the likelihood of the completion given the prompt.

loss = -(1/N) sum log p(token | everything before it), over the N completion and end tokens of the optimizer step. In a
conversation of several turns every assistant turn is a completion.
"""

from ftcore.data.examples import Example
from ftcore.data.layouts import Batch, pack
from ftcore.data.sources import Row
from ftcore.methods.base import Method
from ftcore.methods.terms import Term
from ftcore.models.logprobs import completion_logps


class SFT(Method[Example, Batch]):
    """Cross-entropy on completions."""

    record_type = "prompt_completion"

    packing: bool

    def encode(self, rows: list[Row]) -> list[Example]:
        """Each conversation as one sequence, with loss on the assistant's turns."""
        return self.encoder.prompt_completions(rows)

    def counts(self, example: Example) -> dict[str, int]:
        """Completion tokens without the first token of a sequence, which nothing predicts."""
        return {"tokens": sum(example.completion_mask[1:])}

    def collate(self, examples: list[Example]) -> Batch:
        """Sequences packed into one row, or padded."""
        return pack(examples) if self.packing else super().collate(examples)

    def loss(self, batch: Batch) -> dict[str, Term]:
        """Negative log-likelihood of the completion tokens."""
        logps = completion_logps(self.network, batch)  # (N,)
        return {"nll": Term(-logps, len(logps), "tokens")}
