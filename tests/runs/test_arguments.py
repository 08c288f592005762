"""Command lines and the yaml texts made of them."""

import pathlib

import pytest
import speechbrain as sb
from hypothesis import given, strategies as st

from lgl_plugin.runs.arguments import parse_arguments
from lgl_plugin.runs.plain import dump_settings, plain_settings

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
def test_settings_are_read_as_they_were_written(value):
    tagged = {"!name:torch.nn.Linear": {"value": value}}
    settings = {"one": value, "two": tagged}
    assert plain_settings(dump_settings(settings)) == settings


def test_a_verbs_own_settings_stand_beside_the_options():
    own = {"data_folder": pathlib.Path("/Tape #3: a=b"), "manifest": None}
    words = ["one.yaml", "--lr=0.1", "--device=cpu"]
    path, options, text = parse_arguments(words, own)
    assert path == "one.yaml" and options["device"] == "cpu"
    read = {"lr": 0.1, "data_folder": "/Tape #3: a=b", "manifest": None}
    assert plain_settings(text) == read


@pytest.mark.parametrize(
    "value", ["runs/lr=0.1", "/Tape #3", "a=b #c", "=", "/Tape: 3", "C:"]
)
@pytest.mark.parametrize("join", ["{}={}".format, "{} {}".format])
def test_a_value_is_read_as_it_was_typed(value, join):
    typed = join("--output_folder", value)
    words = typed.split(" ", 1) if typed[15] == " " else [typed]
    path, options, text = parse_arguments(["one.yaml", *words, "--debug"])
    assert path == "one.yaml" and options["debug"]
    assert plain_settings(text) == {"output_folder": value}


@pytest.mark.parametrize("name", ["lr", "device"])
@pytest.mark.parametrize("second", ["--{}=2", "--{} 2"])
def test_an_option_that_is_given_twice(name, second):
    """A setting, and an option of SpeechBrain's, which took the last."""
    words = f"one.yaml --{name}=1 --debug {second.format(name)} --debug"
    with pytest.raises(ValueError, match=f"^--{name} is given twice$"):
        parse_arguments(words.split())


@pytest.mark.parametrize(
    "words, read",
    [
        (["--preci=bf16"], {"preci": "bf16"}),
        (["--preci", "bf16", "--lr=1"], {"preci": "bf16", "lr": 1}),
        (["--ckpt_interval_m=1"], {"ckpt_interval_m": 1}),
        (["--skip_nonfinite"], {"skip_nonfinite": None}),
    ],
)
def test_a_shortened_option_of_speechbrains_is_no_option(words, read):
    """SpeechBrain would take it, and train with the yaml's value."""
    _, options, text = parse_arguments(["one.yaml", *words, "--device", "cpu"])
    assert plain_settings(text) == read and options["device"] == "cpu"
    assert set(options.overridden_args) == {"device"}


@pytest.mark.parametrize(
    "value, read",
    [
        ("!new:Gate {name: a=b}", {"!new:Gate": {"name": "a=b"}}),
        ("{name: a=b}", {"name": "a=b"}),
        ("'/Tape #3'", "/Tape #3"),
    ],
)
def test_a_yaml_text_with_an_equals_sign_stays_one(value, read):
    _, _, text = parse_arguments(["one.yaml", f"--key={value}"])
    assert plain_settings(text) == {"key": read}


@pytest.mark.parametrize(
    "value, read",
    [("[a-z]", "[a-z]"), ("*dense", "*dense"), ("", ""), ("null", None)],
)
def test_a_pattern_is_a_text_whatever_yaml_would_read(value, read):
    """Nothing would stand for all weights, brackets for a list."""
    _, _, text = parse_arguments(["one.yaml", f"--trained_weights={value}"])
    assert plain_settings(text) == {"trained_weights": read}


def test_options_of_speechbrains_stay_its_own():
    words = ["--log_config=/exp/lr=0.1/log.yaml", "--debug", "/lr=1/one.yaml"]
    path, options, text = parse_arguments(words)
    assert path == "/lr=1/one.yaml" and options["debug"] and not text
    assert options["log_config"] == "/exp/lr=0.1/log.yaml"


def test_other_command_lines_are_read_as_speechbrain_reads_them():
    words = ["one.yaml", "--lr", "0.1", "--gate=!new:Gate {tau: 1}", "--seed=2"]
    words += ["--precision=bf16", "--noprogressbar"]
    ours, theirs = parse_arguments(words), sb.parse_arguments(words)
    assert ours[0] == theirs[0] and dict(ours[1]) == dict(theirs[1])
    assert plain_settings(ours[2]) == plain_settings(theirs[2])
