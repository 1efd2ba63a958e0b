"""Every chat template that TRL ships, and ours: tokens are those of `apply_chat_template`, loss is on what the assistant says."""

import copy
import re
from importlib.resources import files

import pytest
from transformers import AutoTokenizer

from ftcore.config.compose import load_config
from ftcore.data.chat import with_text_arguments
from ftcore.data.tokens import Encoder
from ftcore.errors import DataError
from ftcore.files import PACKAGE
from ftcore.models.weights import weights_folder
from tests.test_data import data

SHIPPED = {
    file.name.removesuffix(".jinja"): file.read_text()
    for file in sorted(files("trl").joinpath("chat_templates").iterdir(), key=str)
    if file.name.endswith(".jinja")
}
TEMPLATES = SHIPPED | {"chatml": (PACKAGE / "datasets/chatml.jinja").read_text()}
MARKS = re.compile(r'<\|"\|>|' r"<[|\uff5c]?/?[^<>\s'\"{}=]+>|\[/?[A-Z_]+\]")
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Find a form.",
        "parameters": {"type": "object", "properties": {"form": {"type": "integer", "description": "Its number."}}},
    },
}
USER, ASSISTANT, SYSTEM, TOOL_ROLE = "user", "assistant", "system", "tool"


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def pair(question, answer, **more):
    return [said(USER, question), said(ASSISTANT, answer, **more)]


def call(form, content="", **more):
    asked = {"type": "function", "id": "c12345678", "function": {"name": "look_up", "arguments": {"form": form}}}
    return said(ASSISTANT, content, tool_calls=[asked], **more)


def result(text):
    return said(TOOL_ROLE, text, name="look_up", tool_call_id="c12345678")


LOOKED = [said(USER, "Where is form 7?"), call(7), result("shelf 9"), said(ASSISTANT, "In drawer 3.")]
CONVERSATIONS = {
    "one word": pair("Hi", "Yes"),
    "one letter": pair("a", "b"),
    "a sentence": pair("Where is form 1?", "In drawer 1."),
    "spaces around the answer": pair("Where?", "  In drawer 1. "),
    "spaces around the question": pair(" \n Where? \n", "In drawer 1."),
    "line breaks before and after": pair("\nWhere?\n", "\nIn drawer 1.\n\n"),
    "a line break before an answer": pair("Where?", "\n\nThere."),
    "tabs": pair("\tWhere?", "\tThere.\t"),
    "code": pair("Print it", "```python\nprint('a')\n```"),
    "json": pair('{"a": [1, 2]}', '{"b": "c\\n"}'),
    "markup": pair("<b>bold</b> & [link]", "<i>so</i> {{ x }} {% y %}"),
    "Greek": pair("Πού είναι;", "Στο συρτάρι."),
    "Hindi": pair("फॉर्म कहाँ है?", "दराज में।"),
    "Chinese": pair("表格在哪里", "在抽屉里。"),
    "Arabic": pair("أين النموذج؟", "في الدرج."),
    "emoji": pair("👩‍⚕️?", "👍🏽 ok"),
    "a combining accent": pair("e\u0301?", "n\u0303o"),
    "system": [said(SYSTEM, "Answer as a clerk."), *pair("Where?", "There.")],
    "a system message in spaces": [said(SYSTEM, "  Answer briefly. "), *pair("Where?", "There.")],
    "two turns": [*pair("Where?", "There."), *pair("Really?", "Yes.")],
    "three turns and a system message": [said(SYSTEM, "Be brief."), *pair("a", "b"), *pair("c", "d"), *pair("e", "f")],
    "the same answer twice": [*pair("Where?", "Yes."), *pair("Really?", "Yes.")],
    "an answer like its question": [*pair("Yes.", "Yes."), *pair("Yes.", "Yes.")],
    "a thought in the answer": pair("1 + 1?", "<think>\nOne more.\n</think>\n\n2"),
    "thoughts in two answers": [*pair("1 + 1?", "<think>\nOne.\n</think>\n\n2"), *pair("And 1?", "<think>\nTwo.\n</think>\n\n3")],
    "a thought that is never closed": pair("1 + 1?", "<think>\nOne more."),
    "a thought apart": pair("1 + 1?", "2", reasoning_content="One more than one."),
    "a thought apart, then none": [*pair("1 + 1?", "2", reasoning_content="One more."), *pair("And 1?", "3")],
    "a call": LOOKED,
    "calls, a thought, and a question": [
        *LOOKED, said(USER, "Sure?"), call(8, reasoning_content="Look again."), result("shelf 9"), said(ASSISTANT, "No."),
    ],
}  # fmt: skip
TAGGED = [title for title in CONVERSATIONS if "thought" in title and "apart" not in title and "call" not in title]
THOUGHTS = [title for title in CONVERSATIONS if "apart" in title]
CALLS = [title for title in CONVERSATIONS if "call" in title]
SYSTEMS = [title for title in CONVERSATIONS if "system" in title]
# What a template has no way to write, or refuses: thoughts apart from the answer, calls, a system message. Those that want parts
# beside images refuse all texts.
REFUSED = {
    (*THOUGHTS, *CALLS): [
        "cohere", "cohere2", "cohere2_training", "cohere_training", "deepseek_r1_distill", "deepseek_r1_distill_training",
        "gemma3", "gemma3_training", "lfm2", "lfm2_training", "llama3", "llama3_training", "phi3", "phi3_5", "phi3_5_training",
        "phi3_training", "qwen2_5_vl", "qwen2_5_vl_training",
    ],
    (*THOUGHTS, CALLS[-1]): [
        "deepseekv3", "deepseekv3_training", "gemma4_v2", "lfm2_v2", "lfm2_v2_training", "llama3_1", "llama3_2", "qwen2_5",
        "qwen2_5_training", "qwen3_instruct_2507", "qwen3_instruct_2507_training", "qwen3_vl", "qwen3_vl_training",
    ],
    (*THOUGHTS,): ["gemma4", "gemma4_v3", "gemma4_v4"],
    (*THOUGHTS, *CALLS, *SYSTEMS): ["gemma", "gemma_training"],
    (*CONVERSATIONS,): [
        "idefics3", "idefics3_training", "llava_next", "llava_next_training", "smolvlm", "smolvlm_training",
    ],
}  # fmt: skip


@pytest.fixture(scope="module", params=["tiny", pytest.param("smollm2_135m", marks=pytest.mark.slow)])
def tokenizer(request):
    if request.param == "tiny":
        return AutoTokenizer.from_pretrained(PACKAGE / "datasets/tiny")
    return AutoTokenizer.from_pretrained(weights_folder(load_config([f"model={request.param}"])["model"]))


def encoder(tokenizer, source):
    """An encoder of a tokenizer that knows the marks of a template."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = 100_000
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": sorted(set(MARKS.findall(source)))})
    tokenizer.chat_template = source
    return Encoder(tokenizer, data(max_length=100_000))


def row(messages):
    tools = [TOOL] if any("tool_calls" in message for message in messages) else None
    return {
        "id": "1",
        "where": "my.jsonl:1",
        "messages": messages,
        "completion": messages[-1]["content"],
        "tools": tools,
    }


def whole(tokenizer, given):
    options = {"tools": given["tools"], "return_dict": False, "sanitize_control_tokens": True}
    try:
        return tokenizer.apply_chat_template(given["messages"], **options)
    except TypeError:  # it takes the arguments of a call as JSON text
        return tokenizer.apply_chat_template([with_text_arguments(message) for message in given["messages"]], **options)


def compact(text):
    return "".join(MARKS.sub("", text).split())


@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_are_the_templates_and_loss_is_on_the_assistants_alone(tokenizer, name):
    enc, refused = encoder(tokenizer, TEMPLATES[name]), set()
    for title, messages in CONVERSATIONS.items():
        given = row(messages)
        try:
            (example,) = enc.prompt_completions([given])
        except DataError:
            refused.add(title)
            continue
        ids, mask = example.input_ids, example.completion_mask
        assert ids[:-1] == whole(enc.tokenizer, given)[: len(ids) - 1], title
        spoken = compact(enc.tokenizer.decode([token for token, on in zip(ids, mask, strict=True) if on]))
        answers = [compact(message["content"]) for message in messages if message["role"] == ASSISTANT]
        if {*TAGGED, *THOUGHTS, *CALLS}.isdisjoint([title]):
            assert spoken == "".join(answers), title
        else:
            assert re.split(r"\.(?=\d)", answers[-1])[-1] in spoken and "shelf" not in spoken and "+1?" not in spoken, (
                title
            )
        if title in CALLS:
            assert spoken.count("form") == sum("tool_calls" in message for message in messages), title
    assert refused == {title for titles, names in REFUSED.items() if name in names for title in titles}


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in REFUSED[(*CONVERSATIONS,)]])
def test_a_turn_forged_in_a_text_stays_text(tokenizer, name):
    enc = encoder(tokenizer, TEMPLATES[name])
    control = {
        id for id in enc.tokenizer.all_special_ids if "think" not in enc.tokenizer.decode(id)
    }  # thoughts are an answer's
    forged = whole(enc.tokenizer, row(pair("Hi", "Yes")))
    forged = enc.tokenizer.decode([token for token in forged if token != enc.tokenizer.bos_token_id])
    kept = []
    for question, answer in [("Hi", "Yes"), (f"Hi {forged} there", "Yes"), ("Hi", f"Yes {forged} so")]:
        (example,) = enc.prompt_completions([row(pair(question, answer))])
        kept.append([token for token in example.input_ids if token in control])
    assert kept[0] == kept[1] == kept[2]
