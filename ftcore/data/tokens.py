"""Records to token ids and masks.

A conversation is written by the model's own chat template and tokenised as a whole, so its ids are those of
`apply_chat_template`. Loss is on the assistant's turns and the token that ends each. Text of a row can never forge a turn.
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from itertools import chain

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ftcore.data.chat import ChatTemplate, Conversation, with_text_arguments
from ftcore.data.examples import Encoded, Example, Labelled, Pair, Prompt
from ftcore.data.landmarks import Landmarks
from ftcore.data.messages import Message
from ftcore.data.records import Data
from ftcore.data.sources import Row
from ftcore.errors import DataError

TEXTS = ("prompt", "completion", "chosen", "rejected", "text")
# Why a row has no example.
LOST, UNTRAINED = "left without a trained token", "without a turn that is trained"


class Encoder:
    """Turns rows into examples with a tokenizer, a chat template and a longest length.

    `counts` says how many rows were truncated or dropped. Raises `DataError` for a row over `max_length` when `too_long` is
    `error`, and for `data.chat=true` with a tokenizer without a template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: Data) -> None:
        if data.chat is True and tokenizer.chat_template is None:
            raise DataError(
                "data.chat=true, but the tokenizer has no chat template. Give one with model.chat_template=<file.jinja> "
                "(ftcore://chatml.jinja ships with ftcore), or train on plain text with data.chat=false."
            )
        self.tokenizer, self.data, self.too_long = tokenizer, data, data.too_long
        self.max_length = min(data.max_length, tokenizer.model_max_length)
        self.chat = tokenizer.chat_template is not None if data.chat == "auto" else data.chat
        self.counts: Counter[str] = Counter()
        self.template = ChatTemplate(tokenizer)
        self.landmarks = Landmarks(self.template)
        self.spanning = ""  # a token that holds text of the template and of an answer

    @property
    def limit(self) -> str:
        """What sets the longest length, for messages."""
        own = self.max_length == self.data.max_length
        return f"data.max_length={self.max_length}" if own else f"the model has room for {self.max_length}"

    @property
    def more_room(self) -> str:
        """What to do about rows that are too long."""
        return "Raise data.max_length" if self.max_length == self.data.max_length else "Take a model with more room"

    def prompt_completions(self, rows: list[Row]) -> list[Example]:
        """Examples with loss on every assistant turn and its end token; `messages` take precedence over the columns."""
        encoded = zip(rows, self._encode([_turns(row) for row in rows], rows), strict=True)
        return [example for row, tokens in encoded if (example := self._fitted(row, *tokens.masked(last=False)))]

    def labelled(self, rows: list[Row]) -> list[Labelled]:
        """Prompt and answer with the label, loss on the last answer alone."""
        labelled = zip((row["label"] for row in rows), self._answers(rows), strict=True)
        return [Labelled(e.id, e.input_ids, e.completion_mask, None, e.truncated, good) for good, e in labelled if e]

    def pairs(self, rows: list[Row]) -> list[Pair]:
        """Pairs of examples, loss on the last answers alone. When one side is dropped, so is the pair."""
        sides = self._answers([{**row, "completion": row[side]} for row in rows for side in ("chosen", "rejected")])
        return [
            Pair(row["id"], chosen, rejected, float(row.get("margin", 0.0)))
            for row, chosen, rejected in zip(rows, sides[::2], sides[1::2], strict=True)
            if chosen and rejected
        ]

    def prompts(self, rows: list[Row], max_new_tokens: int = 0) -> list[Prompt]:
        """Prompts to answer, with room for the answer in the model's context.

        One over the length is an error or dropped: truncated it would ask something else.
        """
        longest = min(self.max_length, self.tokenizer.model_max_length - max_new_tokens)
        encoded = zip(rows, self.prompt_ids(rows), strict=True)
        prompts = [Prompt(row["id"], ids, row) for row, ids in encoded if self._fits(row, ids, longest)]
        self.counts += Counter(dropped=len(rows) - len(prompts))
        return prompts

    def texts(self, rows: list[Row], length: int | None = None) -> list[Example]:
        """Raw text cut into pieces of at most `length` tokens (default: the longest allowed), loss on all but the first."""
        length, examples = min(length or self.max_length, self.max_length), []
        eos, cls, sep = self.tokenizer.eos_token_id, self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        start, end = self._start() or [cls if eos is None else eos], [sep] if eos is None and sep is not None else []
        room = length - len(start) - len(end)
        for row, content in zip(rows, self.contents([row["text"] for row in rows]), strict=True):
            for k in range(0, len(content), room):
                ids = start + content[k : k + room] + end
                examples.append(Example(f"{row['id']}/{k}", ids, [False] + [True] * (len(ids) - 1)))
        return examples

    def prompt_ids(self, rows: list[Row]) -> list[list[int]]:
        """Token ids of each row's conversation up to where the model's (last) answer begins."""
        encoded = self._encode([_turns(row, None if "completion" in row else "-") for row in rows], rows)
        return [found.ids[: found.turns[-1][0]] for found in encoded]

    def answered(self, row: Row, text: str) -> Example:
        """A row's prompt with `text` as the answer, cut at the longest length."""
        ids, mask = self._encode([_turns(row, text)], [row])[0].masked(last=True)
        return Example(row["id"], ids[: self.max_length], mask[: self.max_length])

    def spelling_control_tokens(self, rows: list[Row]) -> list[Row]:
        """Rows whose text spells a control token. It stays text, but a person may want to know."""
        spelled = self.template.control.search
        return [row for row in rows if any(map(spelled, _texts(row)))]

    def check_template(self, rows: list[Row]) -> None:
        """Raise `DataError` unless the ids of `rows` are those of the tokenizer's own `apply_chat_template`."""
        rows = [row for row in rows if self.chat and ("prompt" in row or "messages" in row)]
        turns = [_turns(row, None if "completion" in row else "-") for row in rows]
        for row, messages, found in zip(rows, turns, self._encode(turns, rows), strict=True):
            given = [{key: value for key, value in message.items() if key != "trained"} for message in messages]
            given = [with_text_arguments(message) for message in given] if self.template.wants_text_arguments else given
            whole = self.tokenizer.apply_chat_template(
                given, tools=row.get("tools"), sanitize_control_tokens=True, return_dict=False
            )
            if found.ids[: found.own] != whole[: found.own]:
                raise DataError(f"{row['where']}: the tokens are not those of the tokenizer's own apply_chat_template.")

    def notes(self) -> list[str]:
        """What a person should know of how conversations are written."""
        notes = []
        if self.chat and not self.template.turn_end:
            end = self.tokenizer.eos_token
            notes.append(f"the chat template ends answers with no token of its own: {end} is added after the last one")
        if self.template.shortened:
            notes.append("the chat template leaves out a part of some answers, such as thoughts: it is not trained")
        if self.spanning:
            notes.append(
                f"answers begin within a token that holds the template's text too, such as {self.spanning!r}; it trains"
            )
        return notes

    def check_lost(self, rows: int) -> None:
        """Raise `DataError` when more than `data.max_lost` of `rows` rows have nothing to train."""
        for reason in (LOST, UNTRAINED):
            if (lost := self.counts[reason]) and (lost >= rows or lost > self.data.max_lost * rows):
                raise DataError(
                    f"{lost:,} of {rows:,} training rows are {reason}: {self._lost(reason, all_rows=lost >= rows)}"
                )

    def _lost(self, reason: str, *, all_rows: bool) -> str:
        """Why rows have nothing to train, and what to do."""
        if reason == UNTRAINED:
            others = "" if all_rows else " Or raise data.max_lost."
            return (
                f"each of the assistant's turns is switched off ('weight': 0, 'train': false). Switch one on.{others}"
            )
        others = "" if all_rows else ", leave long rows out with data.too_long=drop, or raise data.max_lost"
        return f"it begins after token {self.max_length}, where rows are cut ({self.limit}). {self.more_room}{others}."

    def decode(self, sequences: list[list[int]]) -> list[str]:
        """Token ids as text, without control tokens."""
        return [text.strip() for text in self.tokenizer.batch_decode(sequences, skip_special_tokens=True)]

    def end_ids(self, network: PreTrainedModel) -> list[int]:
        """Tokens that end an answer: the tokenizer's and the model's end of text, and the template's end of turn."""
        configured = getattr(network.generation_config, "eos_token_id", None)
        of_turn = (
            self.tokenizer.convert_tokens_to_ids(self.template.turn_end)
            if self.chat and self.template.turn_end
            else None
        )
        ends = {self.tokenizer.eos_token_id, of_turn}
        return sorted(ends.union(configured if isinstance(configured, list) else [configured]) - {None})

    def contents(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts of rows, in which nothing is a control token."""
        return self.template.speller.contents(texts)

    def _answers(self, rows: list[Row]) -> list[Example | None]:
        """The example of each row, with loss on its last answer; None when dropped."""
        encoded = self._encode([_turns(row) for row in rows], rows)
        return [self._fitted(row, *tokens.masked(last=True)) for row, tokens in zip(rows, encoded, strict=True)]

    def _fitted(self, row: Row, ids: list[int], mask: list[bool]) -> Example | None:
        """The example of a conversation, treated as configured when over the length; None when nothing is left to train."""
        if not any(mask):
            self.counts[UNTRAINED] += 1
            return None
        if truncated := not self._fits(row, ids, self.max_length):
            self.counts["truncated" if self.too_long == "truncate" else "dropped"] += 1
            if self.too_long == "drop":
                return None
        example = Example(row["id"], ids[: self.max_length], mask[: self.max_length], truncated=truncated)
        if any(example.completion_mask[1:]):
            return example
        self.counts[LOST] += 1
        return None

    def _fits(self, row: Row, ids: list[int], longest: int) -> bool:
        """Whether a row has at most `longest` tokens. Raises `DataError` for a longer one when `too_long` is `error`."""
        if len(ids) > longest and self.too_long == "error":
            limit = f"data.max_length is {longest}. Raise it, or choose"
            if longest < self.data.max_length:
                limit = f"and the model has room for {longest}. Choose"
            raise DataError(f"{row['where']}: {len(ids)} tokens, {limit} data.too_long=truncate or drop.")
        return len(ids) <= longest

    def _encode(self, conversations: list[list[Message]], rows: list[Row]) -> list[Encoded]:
        """Token ids of each conversation, up to the end of its last turn."""
        if not self.chat:
            return self._plain(conversations)
        found = self.landmarks.encode(conversations, [row.get("tools") for row in rows])
        others = [k for k, quick in enumerate(found) if quick is None]
        written = [self._written(conversations[k], rows[k]) for k in others]
        spelled = self.template.speller.spell([one.text for one in written], [[*chain(*one.turns)] for one in written])
        careful = (self._encoded(one, *tokens) for one, tokens in zip(written, spelled, strict=True))
        return [quick or next(careful) for quick in found]

    def _written(self, messages: list[Message], row: Row) -> Conversation:
        try:
            return self.template.conversation(messages, row.get("tools"))
        except DataError as error:
            raise DataError(f"{row['where']}: {error}" if row.get("where") else str(error)) from None

    def _encoded(self, written: Conversation, ids: list[int], starts: list[int], ends: list[int]) -> Encoded:
        """A token belongs to a turn when one of its characters does."""
        turns = [(bisect_right(ends, begin), bisect_left(starts, end)) for begin, end in written.turns]
        for (begin, _), (first, _) in zip(written.turns, turns, strict=True):
            if starts[first] < begin:
                self.spanning = str(self.tokenizer.decode([ids[first]]))
        length = turns[-1][1]
        if written.ends:
            return Encoded(ids[:length], turns, written.trained, length)
        turns[-1] = (turns[-1][0], length + 1)
        return Encoded([*ids[:length], self._end_id()], turns, written.trained, length)

    def _end_id(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise DataError("The tokenizer has no end token. Give a template: model.chat_template=<file.jinja>.")
        return int(self.tokenizer.eos_token_id)

    def _plain(self, conversations: list[list[Message]]) -> list[Encoded]:
        """Question and answer as plain text, with the tokenizer's own start and end."""
        if any([message["role"] for message in messages] != ["user", "assistant"] for messages in conversations):
            raise DataError(
                "Conversations of several messages need a chat template: model.chat_template=<file.jinja> "
                "(ftcore://chatml.jinja ships with ftcore), and data.chat must not be false."
            )
        contents = self.contents([message["content"] for messages in conversations for message in messages])
        start, end, encoded = self._start(), [self._end_id()], []
        for question, answer in zip(contents[::2], contents[1::2], strict=True):
            ids = [*start, *question, *answer, *end]
            encoded.append(Encoded(ids, [(len(start) + len(question), len(ids))], [True], len(ids)))
        return encoded

    def _start(self) -> list[int]:
        """The begin-of-text token, if this tokenizer puts one before plain text."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and bos in self.tokenizer("a")["input_ids"] else []


def _turns(row: Row, answer: str | None = None) -> list[Message]:
    """A row as a conversation. Its last turn is the row's `completion`, whichever answer that is, or `answer`."""
    messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}, {"role": "assistant"}]
    last = messages[-1]
    if answer is not None:
        last = {"role": "assistant", "content": answer}
    elif not last.get("tool_calls"):
        last = {**last, "content": row["completion"]}
    return [*messages[:-1], last]


def _texts(row: Row) -> list[str]:
    messages = row.get("messages", ())
    return [*(row[column] for column in TEXTS if column in row), *(message["content"] for message in messages)]
