"""Tables in Markdown."""

from lgl_plugin.utils.tables import markdown_table


def test_cells_of_any_type():
    text = markdown_table(["k", "EER %"], [[50, 2.5], ["all", ""]])
    assert text.splitlines() == [
        "| k | EER % |",
        "| --- | --- |",
        "| 50 | 2.5 |",
        "| all |  |",
    ]
