"""lgl report: the figures of runs and their pages."""

import errno
import os
import tempfile

import pytest
from made_run import make_run

from lgl_plugin.cli.main import main
from lgl_plugin.report.page import Page


@pytest.mark.parametrize("beside", [False, True])
def test_the_page_of_an_adaptation_is_not_replaced(
    adapted, beside, tmp_path, capsys
):
    """A page of training would be an empty one, over the table of rungs."""
    runs = [make_run(tmp_path / "run")] * beside
    page = adapted / "report" / "index.html"
    with pytest.raises(SystemExit, match="2"):
        main(["report", *map(str, [*runs, adapted])])
    printed = capsys.readouterr()
    assert f"Its page: {page}." in printed.err and not printed.out
    assert page.read_text() == "the rungs"


def test_a_folder_that_cannot_be_written_is_named_before_figures(
    tmp_path, monkeypatch, capsys
):
    """A folder that is there already, which to make again is no error."""
    run = make_run(tmp_path / "run")
    (run / "report").mkdir()

    def refuse(dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(Page, "collect", lambda *_: pytest.fail("drawn"))
    with pytest.raises(SystemExit, match="1"):
        main(["report", str(run)])
    printed = capsys.readouterr()
    assert "| phase" in printed.out  # the table needs no disk
    (line,) = printed.err.splitlines()
    assert "Read-only" in line and "Make it writable" in line


def test_a_full_disk_leaves_no_page_without_figures(
    tmp_path, monkeypatch, capsys
):
    run, left, fsync = make_run(tmp_path / "run"), [3], os.fsync

    def full(descriptor):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit, match="1"):
        main(["report", str(run)])
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on the disk" in line and "Make room" in line
    assert not (run / "report" / "index.html").exists()
