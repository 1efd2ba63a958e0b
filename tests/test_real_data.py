"""Data sets that nobody wrote for ftcore train by a data option and the path of a local copy alone."""

from pathlib import Path

import pytest

from tests.conftest import FAST

DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="no local copies of the sets")
@pytest.mark.parametrize(
    ("method", "option", "folder"),
    [("sft", "medquad", "medquad_sft"), ("dpo", "hh_rlhf", "hh_helpful_base"), ("grpo", "medmcqa", "medmcqa_dev")],
)
def test_a_step_on_a_local_copy(ftcore, method, option, folder):
    outcome = ftcore(f"method={method}", f"data={option}", f"data.path={DATA / folder}", "max_steps=1", *FAST)
    assert outcome.status == 0, outcome.err
    assert outcome.summary["steps"] == 1 and "train (1), validation (1), test (1) are the splits" in " ".join(
        outcome.out.split()
    )
