"""docs/reference.md says everything that conf/ and the schema say, of every option and every key."""

import json
import re

import pytest

from ftcore.config import reference
from ftcore.files import PACKAGE, resources
from ftcore.settings import FILES, GROUPS

SCHEMA = json.loads((PACKAGE / "schema.json").read_text())
PAGE = reference.build(SCHEMA)
ROWS = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in PAGE.splitlines() if line.startswith("| `")]
KEYS = {row[0].strip("`") for row in ROWS}


def test_the_page_is_what_conf_and_the_schema_say():
    assert reference.FILE.read_text() == PAGE, "run `make schema`"


def test_every_key_has_a_default_a_type_and_a_meaning():
    for row in ROWS:
        assert len(row) == 4 and all(row), f"put a comment above {row[0]} in conf/"
        assert row[2] not in ("anything", "another value"), row


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_and_option_is_there_and_says_what_it_is(group):
    said = PAGE.partition(f"\n## {group}\n")[2].partition("\n## ")[0]
    assert re.match(r"\n\w", said), f"put a comment above {group} in the defaults of conf/config.yaml"
    for option in (resources() / ("" if group in FILES else "conf") / group).glob("[!_]*.yaml"):
        assert re.search(rf"### {group}={option.stem}\n\n\w", said), f"begin {option} with a comment"


def test_every_key_that_the_schema_knows_is_there():
    assert set(SCHEMA["top"]["properties"]) - set(GROUPS) <= {key.split(".")[0] for key in KEYS}
    known = {key.partition(".")[2] for key in KEYS if key.split(".")[0] in GROUPS}
    for target, node in SCHEMA["targets"].items():
        assert set(node["properties"]) <= known, target


def test_what_markdown_would_read_as_its_own_is_escaped():
    assert reference._prose("a <b> of `<c>`:\n*.x") == r"a \<b> of `<c>`: \*.x"
