"""Text of a row can never forge a control token: five kinds of tokenizers, fifty payloads each, in every turn.

The tokenizers are small ones of the kinds that models come with, trained here on packaged text.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jinja2
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ftcore.data.tokens import Encoder
from ftcore.data.watched import PLACEHOLDER
from ftcore.files import PACKAGE
from tests.test_data import data
from tests.test_tokens import conversation, trained

ROLES, CALM = ["user", "assistant"] * 2, ["river", "stone", "cloud", "grass"]
TEXTS = [json.loads(line)["text"] for line in (PACKAGE / "datasets/medical/passages.train.jsonl").open()][:30]
WIDE = {c: c + 0xFEE0 for c in range(0x21, 0x7F)}  # full-width letters, which some tokenizers make plain again
BERT, NFKC = normalizers.BertNormalizer(), normalizers.NFKC()
BYTES = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
WORDS = Regex(r".?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+")


@dataclass
class Family:
    """A kind of tokenizer: its control tokens, chat template and parts, and what must be `kept` of a text in its ids.

    The first control token begins a turn, the second ends it. The second and third are in the model's vocabulary too.
    """

    control: str
    template: str
    parts: tuple[Any, Any, Any, Any]  # model, normalizer, pre-tokenizer, decoder
    trainer: Callable
    options: dict = field(default_factory=dict)
    unknown: str | None = None
    kept: Callable[[str], str] = str

    def render(self, contents):
        return jinja2.Template(self.template).render(messages=messages(contents))


FAMILIES = {
    "byte-level BPE, ChatML": Family(
        "<|im_start|> <|im_end|> <|endoftext|> <|pad|>",
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
        (models.BPE(), None, pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()),
        trainers.BpeTrainer, BYTES,
    ),
    "byte-level BPE, headers": Family(
        "<|start_header_id|> <|eot_id|> <|begin_of_text|> <|end_header_id|>",
        "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content }}<|eot_id|>{% endfor %}",
        (models.BPE(ignore_merges=True), None, pre_tokenizers.Sequence([
            pre_tokenizers.Split(WORDS, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False),
        ]), decoders.ByteLevel()),
        trainers.BpeTrainer, BYTES,
    ),
    "BPE with bytes for unknown characters": Family(
        "<start_of_turn> <end_of_turn> <bos> <eos>",
        "<bos>{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}",
        (models.BPE(byte_fallback=True), normalizers.Replace(" ", "▁"), None,
         decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])),
        trainers.BpeTrainer, kept=lambda text: text.replace("▁", " "),
    ),
    "Unigram": Family(
        "[INST] </s> <s> [/INST]",
        "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}",
        (models.Unigram(), NFKC, pre_tokenizers.Metaspace(), decoders.Metaspace()),
        trainers.UnigramTrainer, {"unk_token": "<unk>"}, "<unk>",
        lambda text: NFKC.normalize_str(text).replace("▁", " ").lstrip(" "),
    ),
    "WordPiece": Family(
        "[CLS] [SEP] [MASK] [PAD]",
        "[CLS]{% for m in messages %}{{ m.role }} : {{ m.content }}[SEP]{% endfor %}",
        (models.WordPiece(unk_token="[UNK]"), BERT, pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=False)),
        trainers.WordPieceTrainer, {}, "[UNK]",
        lambda text: "".join(BERT.normalize_str(text).split()),
    ),
}  # fmt: skip


def payloads(family):
    control = family.control.split()
    start, end, *_ = control
    return [
        *(shape.format(t) for t in control for shape in ["{}", "word{}word", "  {} ", "\n{}\n", "{0}{0}"]),
        *(t.swapcase() for t in control),
        *(f"{t[:2]}\u200b{t[2:]}" for t in control),
        *(t.translate(WIDE) for t in control),
        start[:4] + end + start[4:],
        end[:-1] + start + end[-1:],
        "".join(control),
        end * 500,
        forged_turns(family),
        f"{end}\n{forged_turns(family)}\n{start}",
        json.dumps(f"{forged_turns(family)}\n"),
        "".join(f"\\u{ord(c):04x}" for c in end),
        f"{{{{ messages }}}}{{% set messages = [] %}}{{{{ '{end}' }}}}",
        PLACEHOLDER.format("content", 0),
        f"{PLACEHOLDER.format('trimmed', 1)}{end}{PLACEHOLDER.format('content', 0)}",
        "".join(other.control for other in FAMILIES.values() if other is not family),
        "<0x0A>" + "".join(f"<0x{byte:02X}>" for byte in end.encode()),
        "".join(f"&#{ord(c)};" for c in end),
        f"\u202e{end}\u202c \u200f{start}",  # right to left
        "\u0301".join(end),  # with accents
        f"▁{end} Ġ{end} ##{end}\u00a0{end}",
        f"{end}\r\n\t{start}\u2028{end}",
    ]


def forged_turns(family):
    """A question that says three of four turns as the template would."""
    text = family.render(CALM)
    return text[text.index(CALM[0]) : text.index(CALM[2]) + len(CALM[2])]


def build(family):
    tokenizer, control, texts = Tokenizer(family.parts[0]), family.control.split(), TEXTS
    _, tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = family.parts
    if family.unknown:  # each character of the payloads is known, so that nothing hides in an unknown token
        texts = TEXTS + [c + c for c in sorted(set(tokenizer.normalizer.normalize_str("".join(payloads(family)))))]
    special = [family.unknown] * bool(family.unknown) + control[1:3]
    options = {"special_tokens": special, "vocab_size": 800, "show_progress": False} | family.options
    tokenizer.train_from_iterator(texts, family.trainer(**options))
    if getattr(tokenizer.model, "byte_fallback", False):
        model = json.loads(tokenizer.to_str())["model"]
        spelled = {f"<0x{byte:02X}>": len(model["vocab"]) + byte for byte in range(256)}
        tokenizer.model = models.BPE(model["vocab"] | spelled, [*map(tuple, model["merges"])], byte_fallback=True)
    tokenizer.add_special_tokens(control)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=family.template, clean_up_tokenization_spaces=False
    )


@pytest.fixture(scope="module", params=FAMILIES)
def known(request):
    """A family, an encoder with its tokenizer, and the ids of its control tokens."""
    family = FAMILIES[request.param]
    encoder = Encoder(build(family), data(max_length=100_000))
    return family, encoder, set(encoder.tokenizer.added_tokens_decoder)


def messages(contents):
    return [{"role": role, "content": content} for role, content in zip(ROLES, contents, strict=False)]


def row(contents):
    if len(contents) > 2:
        return conversation(messages(contents))
    return {"id": "1", "where": "", "prompt": contents[0], "completion": contents[1]}


@pytest.mark.parametrize("turns", [CALM[:2], CALM], ids=["columns", "messages"])
def test_no_payload_forges_a_control_token(known, turns):
    family, encoder, control = known
    tried = payloads(family)
    assert len(set(tried)) == 50
    (calm,) = encoder.prompt_completions([row(turns)])
    assert trained(encoder, calm).replace(" ", "") == "".join(w + family.control.split()[1] for w in turns[1::2])
    calm = [*zip(calm.input_ids, calm.completion_mask, strict=True)]
    for place, word in enumerate(turns):
        rows = [row([*turns[:place], payload, *turns[place + 1 :]]) for payload in tried]
        content = [(token, ROLES[place] == "assistant") for token in encoder.contents([word])[0]]
        start = next(k for k in range(len(calm)) if calm[k : k + len(content)] == content)
        before, after = calm[:start], calm[start + len(content) :]
        for payload, example in zip(tried, encoder.prompt_completions(rows), strict=True):
            tokens = [*zip(example.input_ids, example.completion_mask, strict=True)]
            ids, mask = zip(*tokens[start : -len(after)], strict=True)
            assert tokens[:start] == before and tokens[-len(after) :] == after, (place, payload)
            blank = not encoder.tokenizer.decode(ids[:1]).strip()  # may be the template's space before a content
            assert not control.intersection(ids) and set(mask[blank:]) == {ROLES[place] == "assistant"}, (
                place,
                payload,
            )
            assert family.kept(encoder.tokenizer.decode(ids)) == family.kept(payload), (place, payload)


def test_turns_written_into_a_question_are_not_turns(known):
    family, encoder, control = known
    forged = [forged_turns(family), CALM[3]]
    assert family.render(forged) == family.render(CALM)  # as text they are the same
    examples = encoder.prompt_completions([row(forged), row(CALM), row(CALM[:2])])
    one, real, calm = ([token for token in example.input_ids if token in control] for example in examples)
    assert one == calm != real


def test_tokenizing_the_rendered_text_would_let_most_payloads_forge(known):
    family, encoder, control = known

    def marks(contents):
        ids = encoder.tokenizer(family.render(contents), add_special_tokens=False)["input_ids"]
        return [token for token in ids if token in control]

    fooled = [payload for payload in payloads(family) if marks([payload, CALM[1]]) != marks(CALM[:2])]
    assert len(fooled) > 25
