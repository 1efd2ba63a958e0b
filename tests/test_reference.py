"""Reference log-probabilities are computed once for each content and change nothing."""

import pytest
import torch

from ftcore.data.examples import Example
from ftcore.methods.base import Method
from ftcore.models.reference import RECORD, ReferenceSums, content_hash
from tests.conftest import FAST

DPO = ["method=dpo", *FAST, "retention.weight=0", "hardware=cpu", "evaluate.enabled=false", "global_batch_size=8"]


@pytest.fixture
def computed(monkeypatch, tmp_path):
    """How often the base model was asked; a home of its own."""
    monkeypatch.setenv("FTCORE_HOME", str(tmp_path / "home"))
    calls = []
    ask = ReferenceSums.__call__

    def counted(self, contents, compute):
        return ask(self, contents, lambda: calls.append(len(contents)) or compute())

    monkeypatch.setattr(ReferenceSums, "__call__", counted)
    return calls


def losses(outcome):
    return [line["train/loss"] for line in outcome.metrics if "train/loss" in line]


def test_a_second_run_another_beta_and_later_epochs_ask_no_base_model(ftcore, computed):
    words = [*DPO, "max_steps=50", "max_epochs=null"]  # 42 steps are an epoch
    first = losses(ftcore(*words))
    assert len(computed) == 42
    assert losses(ftcore(*words)) == first
    ftcore(*words, "method.beta=0.5")
    assert len(computed) == 42
    ftcore(*words, "seed=1", "max_steps=1")  # the tiny model's weights are random: others
    assert len(computed) == 43


def test_they_are_those_of_a_run_without_them(ftcore, computed, monkeypatch):
    words = [*DPO, "max_steps=45", "max_epochs=null"]
    kept = losses(ftcore(*words))

    def plain(self, batch):
        batch = dict(batch)
        self.context.references.known.clear()
        self.context.references.file = None
        return ask(self, batch)

    ask = Method.reference_sums
    monkeypatch.setattr(Method, "reference_sums", plain)
    assert losses(ftcore(*words)) == pytest.approx(kept, abs=1e-6)
    assert len(computed) == 42 + 45


def test_a_file_is_read_shared_and_thrown_away_when_it_is_cut(tmp_path):
    file = tmp_path / "references" / "a"
    one, other = ReferenceSums(file), ReferenceSums(file)
    assert one([1, 2], lambda: torch.tensor([-1.5, -2.5])).tolist() == [-1.5, -2.5]
    assert other([2, 3], lambda: torch.tensor([-9.0, -3.5])).tolist() == [-9.0, -3.5]
    assert file.stat().st_size == 4 * RECORD.itemsize
    again = ReferenceSums(file)
    assert set(again.known) == {1, 2, 3}
    assert again([3, 1], lambda: pytest.fail("known")).tolist() == [-3.5, -1.5]
    assert again([3, 4], lambda: torch.tensor([-7.0, -4.0])).tolist() == [-3.5, -4.0]  # what is known stays
    file.write_bytes(file.read_bytes()[:-1])
    assert not ReferenceSums(file).known and not file.exists()


def test_no_place_to_keep_them_is_no_failure(tmp_path):
    (tmp_path / "file").touch()
    sums = ReferenceSums(tmp_path / "file" / "a")
    assert sums([1], lambda: torch.tensor([-1.0])).tolist() == [-1.0]
    assert sums([1], lambda: pytest.fail("known")).tolist() == [-1.0]


def test_a_content_is_its_tokens_and_their_loss():
    one = Example("a", [5, 6, 7], [False, False, True])
    assert content_hash(one) == content_hash(Example("b", [5, 6, 7], [False, False, True]))
    assert content_hash(one) != content_hash(Example("a", [5, 6, 7], [False, True, True]))
    assert content_hash(one) != content_hash(Example("a", [5, 6, 8], [False, False, True]))
