"""lgl report: the figures of runs and their pages."""

import pytest
from made_run import make_run

from lgl_plugin.cli.main import main


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
