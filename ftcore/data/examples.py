"""What rows become: a conversation's token ids, and which of them carry loss. One class for each kind of method."""

from dataclasses import dataclass

from ftcore.data.sources import Row


@dataclass(frozen=True, slots=True)
class Encoded:
    """A conversation as token ids, to the end of its last assistant turn.

    `turns`: tokens (from, to) of each assistant turn, with the token that ends it. `trained`: whether each has loss.
    `own`: how many of the ids the template wrote.
    """

    ids: list[int]
    turns: list[tuple[int, int]]
    trained: list[bool]
    own: int

    def masked(self, *, last: bool) -> tuple[list[int], list[bool]]:
        """Ids up to the last token with loss, and for each whether it has loss: on the trained turns, or the `last` alone."""
        turns = [turn for turn, trained in zip(self.turns, self.trained, strict=True) if trained]
        if last:  # which a comparison or a label is about
            turns = [turn for turn in turns if turn == self.turns[-1]]
        mask = [False] * (turns[-1][1] if turns else 0)
        for begin, end in turns:
            mask[begin:end] = [True] * (end - begin)
        return self.ids[: len(mask)], mask


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence: token ids and, for each, whether it carries loss.

    `targets` are the tokens to predict at the positions with loss; None: each token is predicted from those before it.
    `truncated`: its text goes on beyond the longest length.
    """

    id: str
    input_ids: list[int]
    completion_mask: list[bool]
    targets: list[int] | None = None
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def trained(self) -> int:
        """Number of tokens with loss."""
        return sum(self.completion_mask)


@dataclass(frozen=True, slots=True)
class Labelled(Example):
    """A prompt with an answer, whether the answer is good, and z of its step once it is known (methods/kto.py)."""

    good: bool = False
    z: float | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt, the better one first, and by how much it is better at least (for reward models)."""

    id: str
    chosen: Example
    rejected: Example
    margin: float = 0.0

    def __len__(self) -> int:
        return max(len(self.chosen), len(self.rejected))

    @property
    def trained(self) -> int:
        """Number of tokens of both answers."""
        return self.chosen.trained + self.rejected.trained

    @property
    def truncated(self) -> bool:
        """Whether one of the answers is truncated."""
        return self.chosen.truncated or self.rejected.truncated


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids up to where the answer begins, and their row (rewards read its columns)."""

    id: str
    input_ids: list[int]
    row: Row

    def __len__(self) -> int:
        return len(self.input_ids)
