"""The quick way from conversations to token ids, where a template only writes contents down, between control tokens.

Texts are tokenised as they are, without asking where each token stands. The template's parts are found again by their ids: each
begins with a control token, and no other one may stand between them. In a vocabulary of bytes, ids say which bytes they stand
for, so a part whose ids are there ends where its text ends. What differs (an answer whose first line break joins the
template's, a content that spells a control token) is left to the careful way, see spelling.py.
"""

from functools import cache, cached_property
from typing import Any

from tokenizers import decoders

from ftcore.data.chat import ChatTemplate, is_plain, roles_of
from ftcore.data.examples import Encoded
from ftcore.data.messages import Message
from ftcore.data.spelling import END, START
from ftcore.errors import DataError


class Landmarks:
    """Token ids of conversations by a chat template and its tokenizer, for those that have a quick way."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self.parts = cache(self._parts)

    def encode(self, conversations: list[list[Message]], tools: list[object]) -> list[Encoded | None]:
        """The ids of each conversation, up to the end of its last turn; None where there is no quick way."""
        found: list[Encoded | None] = [None] * len(conversations)
        if not self.controls:
            return found
        quick = list[tuple[int, tuple[str, ...]]]()
        for k, (messages, given) in enumerate(zip(conversations, tools, strict=True)):
            if not given and is_plain(messages) and self.parts(spoken := roles_of(messages)):
                quick.append((k, spoken))
        texts = [self.template.scaffold(spoken).written(conversations[k]) for k, spoken in quick]
        for (k, spoken), text, ids in zip(quick, texts, self._tokens(texts), strict=True):
            if text.isascii() or not (START in text or END in text):
                found[k] = self._located(conversations[k], self.parts(spoken), ids)
        return found

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        return [found.ids for found in self.whole.encode_batch_fast(texts, add_special_tokens=False)] if texts else []

    def _located(self, messages: list[Message], parts: list[list[int]], ids: list[int]) -> Encoded | None:
        """The conversation with the tokens of its turns, if `ids` are these parts and contents without control tokens."""
        if ids[: len(parts[0])] != parts[0]:
            return None
        at, turns, trained = len(parts[0]), list[tuple[int, int]](), list[bool]()
        for message, part in zip(messages, parts[1:], strict=True):
            try:
                end = ids.index(part[0], at)
            except ValueError:
                return None
            if ids[end : end + len(part)] != part or not self.controls.isdisjoint(ids[at:end]):
                return None
            if message["role"] == "assistant":
                turns.append((at, end + 1))
                trained.append(message.get("trained", True))
            at = end + len(part)
        return Encoded(ids[: turns[-1][1]], turns, trained, turns[-1][1]) if at == len(ids) else None

    @property
    def whole(self) -> Any:
        return self.template.speller.whole

    @cached_property
    def controls(self) -> set[int]:
        """Ids of the tokens that stay text where a content spells them; none when this tokenizer has no quick way."""
        if not self.whole or self.whole.normalizer or not isinstance(self.whole.decoder, decoders.ByteLevel):
            return set()
        tokens = self.template.tokenizer.added_tokens_decoder.items()
        found = {number: token for number, token in tokens if self.template.control.fullmatch(token.content)}
        # Some take the spaces around them, which may be a content's, or stand alone only.
        return set() if any(t.lstrip or t.rstrip or t.single_word for t in found.values()) else {*found}

    def _parts(self, roles: tuple[str, ...]) -> list[list[int]]:
        """Ids of what the template writes around the contents of these roles; [] when they cannot be landmarks."""
        try:
            scaffold = self.template.scaffold(roles)
        except DataError:  # it is raised again where the row is named
            return []
        parts = self._tokens(scaffold.parts)
        exact = [self.whole.decode(part, skip_special_tokens=False) for part in parts] == scaffold.parts
        return parts if scaffold.blind and exact and all(part and part[0] in self.controls for part in parts) else []
