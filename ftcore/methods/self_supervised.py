"""Self-supervised learning: learn a domain from raw text by predicting pieces of it.

The objectives differ only in how they transform the text (data/transforms.py); the loss is cross-entropy for all.
next_token: each token from those before it. fill_in_the_middle: the middle of a share of the texts is moved behind prefix and
suffix (Bavarian et al. 2022, arXiv:2207.14255). masked: a share of the words is hidden from an encoder (Devlin et al. 2019,
arXiv:1810.04805). Held-out text is scored as it is, or with the same words masked for every model.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from ftcore.data.examples import Example
from ftcore.data.sources import Row
from ftcore.data.steps import Draw
from ftcore.data.transforms import OBJECTIVES, fim_tokens
from ftcore.errors import ConfigError
from ftcore.methods.base import HeldOut, PositiveFraction
from ftcore.methods.cloze import cloze_right
from ftcore.methods.sft import SFT
from ftcore.methods.terms import ByRow


class SelfSupervised(SFT):
    """Cross-entropy on raw text after the objective's transform."""

    record_type = "text"

    objective: Literal["next_token", "fill_in_the_middle", "masked"]
    share: PositiveFraction

    def __post_init__(self) -> None:
        super().__post_init__()
        self.transform = OBJECTIVES[self.objective](self.foundation.tokenizer, self.share, self.encoder.max_length)
        self.masked = self.objective == "masked"
        if self.masked and self.packing:
            raise ConfigError("method.packing needs a causal objective: an encoder would read packed texts as one.")

    @classmethod
    def architecture_of(cls, node: Mapping[str, object]) -> str:
        """An encoder for masked words, else a causal model."""
        return "MaskedLM" if node["objective"] == "masked" else "CausalLM"

    @classmethod
    def control_tokens(cls, node: Mapping[str, object], tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
        """The three tokens of fill-in-the-middle."""
        return fim_tokens(tokenizer) if node["objective"] == "fill_in_the_middle" else ()

    def encode_text(self, rows: list[Row], length: int | None = None) -> list[Example]:
        """Pieces of text. With objective=masked the same words are masked in every call."""
        pieces = super().encode_text(rows, length)
        return [self.transform(piece, np.random.default_rng(0)) for piece in pieces] if self.masked else pieces

    def encode(self, rows: list[Row]) -> list[Example]:
        """Pieces of text, each at most data.max_length long."""
        return self.encode_text(rows)

    def prepare(self, draw: Draw, random: np.random.Generator) -> list[Example]:
        """New cuts or masks every time a text is drawn."""
        return [self.transform(example, random) for example in draw()]

    def held_out_scores(self, held_out: HeldOut, batch_size: int) -> dict[str, ByRow | float | None]:
        """Cloze accuracy."""
        return {"cloze": cloze_right(self, self.masked, held_out.cloze, batch_size)} if held_out.cloze else {}
