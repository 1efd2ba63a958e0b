"""Works from a built wheel outside the repository: conf/, recipes/ and rows travel inside the package."""

import subprocess
import sys
import zipfile

import pytest

from ftcore.files import PACKAGE

ROOT = PACKAGE.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, built and unpacked where nothing of the checkout is in reach."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(installed, tmp_path, *words):
    code = f"import sys; sys.path.insert(0, {str(installed)!r}); from ftcore.__main__ import main; main()"
    return subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True)


def test_the_wheel_holds_conf_recipes_rows_and_tokenizer_and_no_tests(installed):
    for name in (
        "resources/conf/config.yaml",
        "resources/recipes/medical_sft.yaml",
        "schema.json",
        "datasets/tiny/tokenizer.json",
    ):
        assert (installed / "ftcore" / name).is_file(), name
    assert (installed / "ftcore/datasets/medical/sft.test.jsonl").is_file()
    assert not (installed / "tests").exists()


def test_a_run_from_the_wheel(installed, tmp_path):
    assert "medical_sft" in run(installed, tmp_path, "--help").stdout
    words = [
        "recipes=medical_sft",
        "model=tiny",
        "logger=none",
        "max_steps=1",
        "evaluate.max_rows=2",
        "evaluate.probe=null",
    ]
    result = run(installed, tmp_path, *words)
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "runs").glob("*/*/summary.json"))
