"""What is kept is listed, and only what nobody needs is deleted."""

import pytest
from filelock import FileLock


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A home with rows, weights and two stages, and three runs: finished, stopped, and one that needs a stage."""
    monkeypatch.setenv("FTCORE_HOME", str(tmp_path / "home"))

    def folder(path, **files):
        (tmp_path / path).mkdir(parents=True)
        for name, text in files.items():
            (tmp_path / path / name.replace("_", ".")).write_text(text)
        return tmp_path / path

    folder("home/rows/abc", rows="x" * 2000)
    folder("home/models/m", weights="x" * 3000)
    folder("home/hashes", m_json="x" * 4000)
    used, unused = (
        folder("home/stages/sft-1", summary_json="{}", config_yaml="seed: 1"),
        folder("home/stages/sft-2", summary_json="{}"),
    )
    runs = {
        "finished": folder("runs/a/1", config_yaml="seed: 1", summary_json="{}"),
        "stopped": folder("runs/a/2", config_yaml="seed: 1"),
        "needs": folder("runs/b/1", config_yaml=f"method: {{policy: {used}}}", summary_json="{}"),
    }
    (used / "model").mkdir()
    for run in runs.values():
        (run / "checkpoints").mkdir()
        (run / "checkpoints" / "step").write_text("x" * 1000)
    return {**runs, "used": used, "unused": unused, "home": tmp_path / "home"}


def test_everything_is_listed_with_its_size(ftcore, kept):
    told = ftcore("storage").out
    for word in ("weights", "rows", "hashes", "stages", "runs", "checkpoints", "4.0 kB", "3.0 kB", "2.0 kB"):
        assert word in told


def test_nothing_goes_without_yes(ftcore, kept):
    told = ftcore("storage", "delete=checkpoints,rows").out
    assert "would go" in told
    assert (kept["finished"] / "checkpoints").is_dir()
    assert (kept["home"] / "rows" / "abc").is_dir()


def test_checkpoints_of_finished_runs_go_and_those_that_can_go_on_stay(ftcore, kept):
    assert "the run can go on" in ftcore("storage", "delete=checkpoints", "yes=true").out
    assert not (kept["finished"] / "checkpoints").exists()
    assert (kept["stopped"] / "checkpoints").is_dir()
    assert (kept["finished"] / "summary.json").is_file()


def test_a_stage_that_a_run_needs_stays(ftcore, kept):
    ftcore("storage", "delete=stages", "yes=true")
    assert kept["used"].is_dir()
    assert not kept["unused"].exists()


def test_a_run_goes_by_its_path_and_not_while_it_is_held(ftcore, kept):
    with FileLock(kept["finished"] / ".lock"):
        assert "in use" in ftcore("storage", f"delete={kept['finished']}", "yes=true").out
    assert kept["finished"].is_dir()
    ftcore("storage", f"delete={kept['finished']}", "yes=true")
    assert not kept["finished"].exists()


def test_a_link_is_deleted_and_not_followed(ftcore, kept, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("x")
    (kept["home"] / "rows" / "link").symlink_to(tmp_path / "elsewhere")
    ftcore("storage", "delete=rows", "yes=true")
    assert not (kept["home"] / "rows" / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "mine").is_file()


@pytest.mark.parametrize("words", [["delete=row"], ["delete=runs"], ["delet=rows"], ["delete=/etc"], ["delete=../.."]])
def test_what_is_not_of_the_list_is_refused(fails, kept, words):
    fails(2, "storage", *words, "yes=true")
    assert kept["finished"].is_dir()


def test_a_path_with_commas_is_one_path(ftcore, tmp_path):
    run = tmp_path / "a, b (1)" / "name" / "then"
    run.mkdir(parents=True)
    (run / "config.yaml").touch()
    assert f"would go: {run}," in ftcore("storage", "output_dir=a, b (1)", f"delete={run}").out
