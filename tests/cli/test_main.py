"""The command's front: quick help, errors in a line, statuses."""

import subprocess
import sys

import pytest

from lgl_plugin.cli.main import VERBS, at_home, main


def python(*arguments, **options):
    """Runs Python; its status, stdout and stderr."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )
    return done.returncode, done.stdout, done.stderr


def test_help_imports_neither_torch_nor_numpy():
    """They take seconds, and help is to come at once."""
    code = (
        "import sys; from lgl_plugin.cli.main import build_parser;"
        "text = build_parser().format_help();"
        "heavy = {'torch', 'numpy', 'speechbrain'} & sys.modules.keys();"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    status, _, stderr = python("-c", code)
    assert status == 0, stderr


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([verb, "--help"])
    assert f"usage: lgl {verb}" in capsys.readouterr().out


def test_help_says_what_an_option_does_in_that_verb(capsys):
    """`compare` reads single channels; `--debug` of `train` tries it out."""
    said = {}
    for verb in ("compare", "embed", "train", "status"):
        with pytest.raises(SystemExit, match="0"):
            main([verb, "--help"])
        said[verb] = " ".join(capsys.readouterr().out.split())
    left_out = "files without it are left out"
    assert left_out in said["embed"] and left_out not in said["compare"]
    assert "a few batches" in said["train"]
    assert "a few batches" not in said["status"]


def test_a_wrong_call_is_one_line_and_status_2(capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        main(["status", str(tmp_path / "nowhere")])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lgl status: ") and "there is no folder" in line


@pytest.mark.parametrize(
    "words", [["embed", "enc", "audio", ""], ["check", ""]]
)
def test_an_empty_word_is_no_folder(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "is empty: is a variable of the shell unset?" in (
        capsys.readouterr().err
    )


def test_a_value_that_stands_in_an_arguments_place_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--n_clusters", "9", "/audio", "--output_folder=/run"])
    assert "write --n_clusters=9, or /audio before" in capsys.readouterr().err


def test_a_tilde_behind_an_equals_sign_is_the_home_folder(
    capsys, tmp_path, monkeypatch
):
    """Shells leave it: the results would go to a folder of that name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SystemExit, match="2"):
        main(["status", "~/mine"])
    assert f"there is no folder {tmp_path / 'mine'}" in capsys.readouterr().err
    assert at_home(["~/a", "b~", None, 3]) == [f"{tmp_path}/a", "b~", None, 3]


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        main(["status", str(tmp_path / "nowhere"), "--debug"])


@pytest.mark.parametrize(
    "error, said",
    [
        (OSError(28, "No space left on the disk", "there"), "No space left"),
        (MemoryError(), "MemoryError"),
        (ImportError("No module named 'onnx'"), "No module named"),
    ],
)
def test_a_failure_is_status_1(capsys, tmp_path, monkeypatch, error, said):
    """Such as a full disk, of which the call is innocent."""

    def fail(*_args, **_options):
        raise error

    monkeypatch.setattr("lgl_plugin.dataio.synthetic.make_corpus", fail)
    with pytest.raises(SystemExit, match="1"):
        main(["corpus", str(tmp_path)])
    assert said in capsys.readouterr().err


def test_ctrl_c_is_one_line_and_a_shells_status(capsys, tmp_path, monkeypatch):
    """Also where no work has to be finished first, as in `lgl verify`."""

    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("lgl_plugin.dataio.synthetic.make_corpus", interrupted)
    with pytest.raises(SystemExit, match="130"):
        main(["corpus", str(tmp_path)])
    assert capsys.readouterr().err == "lgl corpus: stopped by Ctrl-C\n"


def test_faults_of_the_program_keep_their_traceback(tmp_path, monkeypatch):
    def faulty(*_args, **_options):
        raise KeyError("a bug")

    monkeypatch.setattr("lgl_plugin.dataio.synthetic.make_corpus", faulty)
    with pytest.raises(KeyError):
        main(["corpus", str(tmp_path)])


def test_unknown_options_are_refused(capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        main(["status", str(tmp_path), "--no_such_option=1"])
    assert "--no_such_option=1" in capsys.readouterr().err


def test_threads_spin_briefly_unless_the_user_says_otherwise():
    """OpenMP reads it once, as torch is loaded: set before that."""
    code = (
        "import os, sys; from lgl_plugin.cli import main as front;"
        "front.VERBS = ('recipe',); sys.argv = ['lgl', 'recipe', '.'];"
        "from lgl_plugin.cli import recipe;"
        "recipe.run = lambda **o: print(os.environ.get('GOMP_SPINCOUNT'),"
        "'torch' in sys.modules); front.main()"
    )
    environment = {"PATH": ""}
    assert python("-c", code, env=environment)[1] == "1000 False\n"
    environment["OMP_WAIT_POLICY"] = "active"
    assert python("-c", code, env=environment)[1] == "None False\n"
