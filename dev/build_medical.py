"""Derive the rows of data=medical from ftcore/datasets/medical/facts.jsonl: `make data`.

One fact gives: a prompt/completion row per phrasing, two preference pairs, a passage, a cloze sentence and prompts with
answers for reinforcement learning. The last phrasing of every fact is held out: it appears in test files alone. Passages are
split by fact (every sixth is held out), because a passage says more than its fact.
"""

import json
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "ftcore" / "datasets" / "medical"


def rows_of(fact: dict, number: int) -> dict[str, list[dict]]:
    """File name -> rows that one fact gives."""
    *seen, held_out = fact["questions"]
    test = len(seen)
    passage_split = "test" if number % 6 == 5 else "train"
    prompts = [*((k, q, "train") for k, q in enumerate(seen)), (test, held_out, "test")]
    files: dict[str, list[dict]] = {}

    def add(file: str, suffix: str, **columns) -> None:
        files.setdefault(file, []).append({"id": f"{fact['id']}/{suffix}", "fact": fact["id"], **columns})

    for k, question, split in prompts:
        answer = {"completion": fact["completion"], "answer": fact["accept"]}
        add(f"sft.{split}", f"sft-{k}", prompt=question, **answer)
        add(f"prompts.{split}", f"prompt-{k}", prompt=question, answer=fact["accept"])
    for k, wrong in enumerate(fact["wrong"]):
        add("preference.train", f"pair-{k}", prompt=seen[k], chosen=fact["completion"], rejected=wrong)
    pair = {"chosen": fact["completion"], "rejected": fact["wrong"][number % 2]}
    add("preference.test", "pair-test", prompt=held_out, **pair, answer=fact["accept"])
    add(f"passages.{passage_split}", "passage", text=fact["passage"])
    add("cloze.test", "cloze", text=fact["cloze"], answer=fact["cloze_answer"])
    return files


def build() -> dict[str, str]:
    """File name -> content of every derived file."""
    lines: dict[str, list[str]] = {}
    facts = [json.loads(line) for line in (FOLDER / "facts.jsonl").read_text().splitlines()]
    for number, fact in enumerate(facts):
        for file, rows in rows_of(fact, number).items():
            lines.setdefault(f"{file}.jsonl", []).extend(json.dumps(row) for row in rows)
    return {file: "\n".join(content) + "\n" for file, content in lines.items()}


if __name__ == "__main__":
    for file, content in build().items():
        (FOLDER / file).write_text(content)
        print(f"{file}: {content.count(chr(10))} rows")
