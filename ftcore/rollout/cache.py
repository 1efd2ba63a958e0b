"""Keys and values of the tokens so far, with room for those to come: a new token copies no earlier one."""

from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """A cache layer (B, heads, T, size) that keeps `room` further places beside its T tokens.

    transformers' own grows by concatenation, which copies it whole for each token; its static one cannot let rows leave.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.places: tuple[Tensor, Tensor] | None = None  # for keys and values, (B, heads, T + room, size)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, heads, new, size) and return all of them."""
        before, new = self.get_seq_length(), key_states.shape[-2]
        if not before:  # the prompt, whose rows are repeated before the next tokens come
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        if self.places is None or before + new > self.places[0].shape[-2]:
            self.places = self._with_room(self.keys), self._with_room(self.values)  # type: ignore[arg-type]
        for places, states in zip(self.places, (key_states, value_states), strict=True):
            places[:, :, before : before + new] = states
        self.keys, self.values = (places[:, :, : before + new] for places in self.places)
        return self.keys, self.values

    def _with_room(self, states: Tensor) -> Tensor:
        rows, heads, length, size = states.shape
        places = states.new_empty(rows, heads, length + self.room, size)
        places[:, :, :length] = states
        return places

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` alone."""
        super().batch_select_indices(indices)
        self.places = None


def roomy_cache(config: PretrainedConfig, room: int) -> DynamicCache:
    """An empty cache for a network, with `room` places after the prompt in each layer that attends to all tokens."""
    cache = DynamicCache(config=config.get_text_config())
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
