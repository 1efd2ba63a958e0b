"""What rows become: token ids, and which of them carry loss. One class for each kind of method."""

from dataclasses import dataclass

from ftcore.data.sources import Row


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
