"""A method, a reward and a data set of a user's own package run with nothing changed here but `trust` on the command line."""

import sys

import pytest

FILES = {
    "our_team/__init__.py": "",
    "our_team/methods.py": '''
from typing import Annotated

from annotated_types import Gt

from ftcore.methods.terms import Term
from ftcore.methods.sft import SFT


class SquaredSFT(SFT):
    """Likelihood plus the square of each token's surprise."""

    square: Annotated[float, Gt(0)]

    def loss(self, batch):
        terms = super().loss(batch)
        return terms | {"square": Term(terms["nll"].total ** 2, terms["nll"].size, "tokens", self.square)}
''',
    "our_team/rewards.py": "def brevity(completions, **columns):\n    return [-len(text) / 100 for text in completions]\n",
    "our_team/data.py": '''
from ftcore.data import Data, Records


class Doubled(Data):
    """Every training row twice."""

    def load(self, record_type: str) -> Records:
        records = super().load(record_type)
        return Records(records.type, records.train * 2, records.validation, records.test)
''',
    "conf/method/squared.yaml": """
defaults: [sft, _self_]
_target_: our_team.methods.SquaredSFT
square: 0.1
""",
    "conf/data/ours.yaml": """
defaults: [medical, _self_]
_target_: our_team.data.Doubled
""",
}
WORDS = ["model=tiny", "logger=none", "hardware=cpu", "max_steps=2", "evaluate.enabled=false"]


@pytest.fixture
def package(tmp_path, monkeypatch):
    for name, text in FILES.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "our_team"]:
        del sys.modules[name]


def test_a_method_and_a_data_set_of_ones_own(ftcore, package):
    words = ["--config-dir", str(package / "conf"), "trust=[our_team]", "method=squared", "data=ours", *WORDS]
    outcome = ftcore(*words, "method.square=0.5")
    assert outcome.status == 0, outcome.err
    first = outcome.metrics[0]
    retention = first.get("train/retention", 0.0)
    assert first["train/loss"] == pytest.approx(first["train/nll"] + 0.5 * first["train/square"] + retention, rel=1e-5)
    assert "1,008 train" in outcome.out


def test_a_reward_of_ones_own(ftcore, package):
    outcome = ftcore(*WORDS, "trust=[our_team]", "method=grpo", "method.rewards=[our_team.rewards.brevity]")
    assert outcome.status == 0, outcome.err
    assert outcome.metrics[0]["train/rewards/our_team.rewards.brevity"] < 0


def test_without_trust_nothing_of_it_is_imported(fails, package):
    words = ["--config-dir", str(package / "conf"), "method=squared", *WORDS]
    assert "trust=[our_team]" in fails(2, *words)
    assert "trust=[our_team]" in fails(2, *WORDS, "method=grpo", "method.rewards=[our_team.rewards.brevity]")
    assert "our_team" not in sys.modules


def test_a_parameter_of_ones_own_method_is_checked_like_any_other(fails, package):
    words = ["--config-dir", str(package / "conf"), "trust=[our_team]", "method=squared", *WORDS]
    assert "method.square must be a number above 0" in fails(2, *words, "method.square=-1")
    assert "did you mean 'square'" in fails(2, *words, "method.sqare=1")


def test_no_file_may_say_whom_to_trust(fails, package):
    recipe = package / "conf" / "recipes" / "sly.yaml"
    recipe.parent.mkdir()
    recipe.write_text("# @package _global_\ntrust: [our_team]\n")
    assert "command line only" in fails(2, "--config-dir", str(package / "conf"), "recipes=sly", *WORDS)
    words = ["method.stages.policy=['method=sft','trust=[our_team]']", "method=rlhf"]
    assert "may set a method and its keys, not trust" in fails(2, *words, *WORDS)
