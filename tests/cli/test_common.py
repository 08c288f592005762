"""Settings and options that several verbs of lgl share."""

from hypothesis import given, strategies as st

from lgl_plugin.cli.common import as_yaml, parse_settings
from lgl_plugin.runs.plain import plain_settings

TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.text(
        st.sampled_from(" #=:'\"\\{}[]<>!&*-~\n\u0085\u2028a1e"), max_size=9
    ),
)
VALUES = st.recursive(
    TEXTS | st.none() | st.booleans() | st.integers() | st.floats(-1e9, 1e9),
    lambda inner: st.lists(inner) | st.dictionaries(st.just("key"), inner),
    max_leaves=5,
)


@given(VALUES)
def test_values_are_read_as_they_were(value):
    tagged = {"!name:torch.nn.Linear": {"value": value}}
    text = f"one: {as_yaml(value)}\ntwo: {as_yaml(tagged)}"
    assert plain_settings(text) == {"one": value, "two": tagged}


def test_a_verbs_own_values_stand_beside_the_options():
    own = {"data_folder": "/Tape #3: a=b", "manifest": None}
    path, options, text = parse_settings(
        "one.yaml", ["--lr=0.1", "--device=cpu"], own
    )
    assert path == "one.yaml" and options["device"] == "cpu"
    assert plain_settings(text) == {"lr": 0.1, **own}
