"""Damaged files: a value or the documented error, whatever the damage.

`python tests/fuzz.py --minutes 5` goes on where this ends.
"""

import hypothesis
import pytest
from fuzz import KINDS, NASTY, Target, attempt, damage, lay_out, targets
from hypothesis import strategies as st

TARGETS = targets()
shares = st.floats(0, 1, exclude_max=True)
payloads = st.one_of(st.sampled_from(NASTY), st.binary(max_size=8))
edits = st.lists(
    st.tuples(st.sampled_from(KINDS), shares, shares, payloads), max_size=5
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    lay_out(folder)
    return folder


@pytest.mark.parametrize("name", TARGETS)
@hypothesis.settings(max_examples=40)
@hypothesis.given(data=st.data(), changes=edits)
def test_damage_gives_a_value_or_the_documented_error(
    name, folder, data, changes
):
    target = TARGETS[name]
    seed = data.draw(st.sampled_from(target.seeds))
    attempt(target, folder, damage(seed, changes))


@pytest.mark.parametrize("name", TARGETS)
def test_whole_files_are_read(name, folder):
    """Else the damage would not be what is tested."""
    target = TARGETS[name]
    assert {attempt(target, folder, seed) for seed in target.seeds} <= {"value"}


def test_undocumented_errors_are_failures(folder):
    def wrong(path):
        raise KeyError(path)

    with pytest.raises(KeyError):
        attempt(Target("x", [], wrong), folder, b"")
