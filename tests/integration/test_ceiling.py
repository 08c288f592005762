"""The ceiling's script as torchrun starts it; test_paper.py trains it."""

import re
import signal
import sys
import types

import ceiling  # of the recipe's folder
import pytest
import speechbrain as sb
import train_lgl
from tiny import RECIPE

from lgl_plugin.runs.schema import Settings
from lgl_plugin.utils.signals import stop


def test_ranks_are_joined_and_errors_are_explained(monkeypatch, capsys):
    """Before anything that they share: each would train a run of its own."""
    seen = []

    def load(*given):
        seen.append(signal.getsignal(signal.SIGTERM) == stop.handle)
        raise ValueError("what is wrong")

    joined = sb.utils.distributed
    monkeypatch.setattr(joined, "ddp_init_group", lambda _: seen.append("join"))
    monkeypatch.setattr(train_lgl, "load_settings", load)
    yaml = str(RECIPE / "hparams" / "small_stage2.yaml")
    monkeypatch.setattr("sys.argv", ["ceiling.py", yaml, "--data_folder=x"])
    with pytest.raises(SystemExit) as end:
        ceiling.main({2: ceiling.train_ceiling})
    assert end.value.code == 2 and seen == ["join", True]
    assert capsys.readouterr().err == "ValueError: what is wrong\n"


def test_a_yaml_of_stage_1_is_refused_before_a_folder_is_written(
    monkeypatch, capsys, tmp_path
):
    yaml = str(RECIPE / "hparams" / "small_stage1.yaml")
    typed = [yaml, "--data_folder=x", f"--output_folder={tmp_path}/run"]
    monkeypatch.setattr("sys.argv", ["ceiling.py", *typed])
    with pytest.raises(SystemExit):
        ceiling.main({2: ceiling.train_ceiling})
    assert f"{yaml} is of stage 1, which" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["train_lgl", "pretrain", "pretraining_study", "paper"]
)
def test_threads_spin_briefly_in_each_script(name):
    """Set after torch is loaded, it would do nothing."""
    text = (RECIPE / f"{name}.py").read_text("utf-8")
    before, _, after = text.partition("\nspin_briefly()")
    imported = re.findall(r"^(?:import|from) (\w+)", before, re.MULTILINE)
    assert set(imported) <= {*sys.stdlib_module_names, "lgl_plugin"}
    assert before.count("lgl_plugin.") == 1 and after


def test_the_speakers_are_read_past_the_session(tmp_path, monkeypatch):
    """The manifest of a session names none."""

    class Found(Exception):
        """The encoder is looked for behind the check of speakers."""

    def find(session):
        raise Found

    monkeypatch.setattr(ceiling, "find_encoder", find)
    settings = Settings.model_construct(manifest=None, data_folder="corpus")
    run = types.SimpleNamespace(folder=tmp_path)
    session = types.SimpleNamespace(settings=settings, run=run)
    for last, error in (("bob", Found), ("", ValueError)):
        (tmp_path / "manifest.csv").write_text(
            "ID,duration,wav,start,stop,spk_id\n"
            "a,1,$data_root/a.wav,0,16000,ann\n"
            f"b,1,$data_root/b.wav,0,16000,{last}\n"
        )
        with pytest.raises(error):
            ceiling.train_ceiling(session)
