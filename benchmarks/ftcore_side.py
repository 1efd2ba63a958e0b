"""One run of ftcore by its own command line, with a clock at the end of each step. It writes down the order of its rows."""

import json
import time
from pathlib import Path
from typing import Any

from cases import SHARED, STAGES, Case, result


def run(case: Case, folder: Path, steps: int, precision: str | None) -> dict[str, Any]:
    """`steps` timed steps of `folder`/rows.jsonl; `precision` replaces the case's."""
    from ftcore.cli.command import run_command
    from ftcore.methods.base import Method
    from ftcore.methods.online import OnlineMethod
    from ftcore.models.reference import ReferenceSums
    from ftcore.train import prepare
    from ftcore.train.loggers import JSONLines

    prepare.ReferenceSums = lambda _: ReferenceSums()  # type: ignore[assignment,misc]  # nothing is kept from one measurement to the next
    ends: list[float] = []
    metrics: list[dict[str, float]] = []
    order: list[dict[str, Any]] = []
    rows_of_step, sample_groups, log = Method.rows_of_step, OnlineMethod.sample_groups, JSONLines.log_metrics

    def noted_rows(method: Method, *given: Any) -> list[Any]:
        rows = rows_of_step(method, *given)
        order.extend([] if isinstance(method, OnlineMethod) else [_tokens(row) for row in rows])
        return rows

    def noted_prompts(method: OnlineMethod, prompts: list[Any], random: Any) -> list[Any]:
        order.extend({"prompt": [{"role": "user", "content": prompt.row["prompt"]}]} for prompt in prompts)
        return sample_groups(method, prompts, random)

    def timed(logger: JSONLines, values: dict[str, float], step: int | None = None) -> None:
        ends.append(time.perf_counter())
        metrics.append({key.removeprefix("train/"): value for key, value in values.items()})
        log(logger, values, step)

    Method.rows_of_step, OnlineMethod.sample_groups, JSONLines.log_metrics = noted_rows, noted_prompts, timed  # type: ignore[method-assign,assignment]
    if run_command(words(case, folder, steps, precision)):
        raise SystemExit(1)
    (folder / "order.json").write_text(json.dumps(order))
    first = {"loss": metrics[0]["loss"], "last": metrics[-1]["loss"], "chosen": metrics[0].get("logps/chosen")}
    return result(ends, **first, length=[one.get("completions/length") for one in metrics])


def words(case: Case, folder: Path, steps: int, precision: str | None) -> list[str]:
    """The command: one step more than are timed, since the first is left out."""
    stages = [f"method.{stage}={folder}/{stage}" for stage in STAGES] if "method=rlhf" in case.words else []
    data = [f"data.path={folder}/rows.jsonl", f"data.max_length={case.length}", "data.test_share=0"]
    given = [word for word in case.words if not (precision and word.startswith("hardware.precision="))]
    given += [f"hardware.precision={precision}"] if precision else []
    own = [*given, *stages, *data, f"max_steps={steps + 1}"]
    keys = {word.split("=")[0] for word in own}
    return [word for word in SHARED if word.split("=")[0] not in keys] + own


def _tokens(row: Any) -> dict[str, Any]:
    if not hasattr(row, "chosen"):
        labels = [token if bit else -100 for token, bit in zip(row.input_ids, row.completion_mask, strict=True)]
        return {"input_ids": row.input_ids, "labels": labels}
    prompt = row.chosen.completion_mask.index(True)
    answers = {f"{side}_ids": getattr(row, side).input_ids[prompt:] for side in ("chosen", "rejected")}
    return {"prompt_ids": row.chosen.input_ids[:prompt], **answers}
