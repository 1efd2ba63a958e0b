"""What a folder of weights says is checked before it is used; what is saved can be used by others."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ftcore.files import PACKAGE
from ftcore.models import saving
from ftcore.models.foundation import Foundation
from tests.conftest import FAST

WORDS = [*FAST, "max_steps=1", "evaluate.enabled=false", "retention.weight=0"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder of weights as anybody has it."""
    folder = tmp_path_factory.mktemp("secret-home") / "small-base"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(PACKAGE / "datasets/tiny")).save_pretrained(folder)
    AutoTokenizer.from_pretrained(PACKAGE / "datasets/tiny").save_pretrained(folder)
    return folder


def trained(ftcore, *words):
    outcome = ftcore(*WORDS, *words)
    assert outcome.status == 0, outcome.err
    return outcome.folder


def half(tensors):
    return {name: value for k, (name, value) in enumerate(sorted(tensors.items())) if k % 2}


VERBS = [["eval"], ["chat", "prompt=Hi"], ["export"], ["pack", "output_dir=packed"]]
ADAPTERS = {
    "missing": half,
    "not finite": lambda tensors: {name: value * torch.nan for name, value in tensors.items()},
    "of another shape": lambda tensors: {name: value[:1] for name, value in tensors.items()},
    "left over": lambda tensors: {**tensors, "base_model.model.more.weight": torch.ones(2)},
}


@pytest.mark.parametrize("fault", ADAPTERS)
@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb[0])
def test_an_adapter_that_is_not_whole_is_refused_by_all_that_load_it(ftcore, fails, fault, verb):
    run = trained(ftcore)
    file = run / "model/adapter_model.safetensors"
    save_file(ADAPTERS[fault](load_file(file)), file)
    message = fails(4, *verb, f"run={run}")
    assert "adapter_model.safetensors is not the adapter" in message and fault in message
    assert fault in fails(4, *WORDS, f"model.path={run}", "name=next")


@pytest.mark.parametrize(
    ("key", "value"),
    [("r", 10**9), ("target_modules", "(a+)+$"), ("use_dora", True), ("lora_alpha", float("nan")), ("unknown_key", 5),
     ("auto_mapping", {"base_model_class": "os.system"}), ("layers_to_transform", [10**9])],
)  # fmt: skip
def test_a_description_of_another_adapter_is_refused_or_not_read(ftcore, fails, key, value):
    run = trained(ftcore)
    file = run / "model/adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    if key == "auto_mapping":
        assert ftcore("chat", f"run={run}", "prompt=Hi").status == 0
    else:
        assert key in fails(4, "chat", f"run={run}", "prompt=Hi")


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_attention_heads", 0), ("vocab_size", -5), ("hidden_size", "wide"), ("num_hidden_layers", 10**7),
     ("attention_dropout", 5), ("rms_norm_eps", float("inf"))],
)  # fmt: skip
def test_impossible_numbers_of_a_model_are_named(fails, base, tmp_path, key, value):
    folder = tmp_path / "broken"
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    message = fails(4, *WORDS, f"model.path={folder}", "model.random_weights=false")
    assert "config.json" in message


def test_a_weight_that_is_not_finite_is_named(fails, base, tmp_path):
    shutil.copytree(base, tmp_path / "broken")
    file = tmp_path / "broken/model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    message = fails(4, *WORDS, f"model.path={tmp_path / 'broken'}", "model.random_weights=false")
    assert "1 weights hold NaN or infinity: model.norm.weight" in message


@pytest.mark.parametrize("name", [["a.safetensors"], "../other.safetensors"], ids=["a list", "a path"])
def test_an_index_that_names_no_file_beside_it_is_refused(fails, base, tmp_path, name):
    shutil.copytree(base, tmp_path / "broken")
    (tmp_path / "broken/model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": name}})
    )
    message = fails(4, *WORDS, f"model.path={tmp_path / 'broken'}", "model.random_weights=false")
    assert "model.safetensors.index.json" in message


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_what_is_saved_names_its_base_without_a_path_and_says_what_it_is(ftcore, base, adapter):
    words = [f"model.path={base}", "model.random_weights=false", f"adapter={adapter}"]
    outcome = ftcore(*FAST, "max_steps=1", "evaluate.max_rows=4", "retention.weight=0", *words)
    assert outcome.status == 0, outcome.err
    model = outcome.folder / "model"
    assert not [file.name for file in model.iterdir() if str(base.parent).encode() in file.read_bytes()]
    if adapter == "lora":
        assert json.loads((model / "adapter_config.json").read_text())["base_model_name_or_path"] == "small-base"
    card = (model / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "small-base" and front["library_name"] == (
        "peft" if adapter == "lora" else "transformers"
    )
    for part in ("## Scores", "## Licence", "## How to load it", outcome.summary["data_sha256"], "not known"):
        assert part in card


def test_the_card_of_private_rows_names_no_data(ftcore, tmp_path):
    lines = [json.dumps({"prompt": f"Question {k}?", "completion": "A."}) + "\n" for k in range(9)]
    (tmp_path / "secret-patients.jsonl").write_text("".join(lines))
    run = trained(ftcore, "data=jsonl", f"data.path={tmp_path / 'secret-patients.jsonl'}", "private=true")
    card = (run / "model/README.md").read_text()
    assert "data set: private" in card and "secret-patients" not in card


def test_weights_have_the_mode_that_the_umask_gives(ftcore):
    file = trained(ftcore) / "model/adapter_model.safetensors"
    assert file.stat().st_mode & 0o077 == (file.parent / "adapter_config.json").stat().st_mode & 0o077


@pytest.mark.parametrize("tied", [True, False])
def test_a_large_model_is_written_in_several_files_that_transformers_reads(ftcore, base, tmp_path, monkeypatch, tied):
    monkeypatch.setattr(saving, "LARGEST", "200KB")
    config = AutoConfig.from_pretrained(base, tie_word_embeddings=tied)
    network = AutoModelForCausalLM.from_config(config)
    saving.save_model(Foundation(network, AutoTokenizer.from_pretrained(base)), tmp_path / "model", None, "")
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 600_000 for file in files)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert all(map(torch.equal, network.state_dict().values(), again.state_dict().values()))
    names = {name for file in files for name in load_file(file)}
    assert ("lm_head.weight" in names) == (not tied)
