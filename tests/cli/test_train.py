"""lgl train: which key goes where, the preset, and what is refused early."""

import json
import types

import numpy as np
import pytest
import soundfile
from speechbrain.utils import distributed as sb_distributed

from lgl_plugin.cli import train
from lgl_plugin.cli.main import main
from lgl_plugin.runs.arguments import key_of
from lgl_plugin.runs.settings import load_settings
from lgl_plugin.utils import distributed
from lgl_plugin.utils.distributed import launch_command


def parts(*words, preset="small", clusters=7):
    """Each stage's options and what is usual, from key to value."""
    choices = {"preset": preset, "n_clusters": clusters}
    given = train.as_pairs(list(words))
    both = train.stages(choices, "/audio", "/run", given)
    found = []
    for _, options, usual in both:
        pairs = (option.lstrip("-").partition("=") for option in options)
        found.append({key: value for key, _, value in pairs} | usual)
        assert not usual.keys() & {key_of(option) for option in options}
    return found


def test_own_audio_needs_two_options():
    first, second = parts()
    for options in (first, second):
        for name in ("data_folder", "train_folder", "trial_folder"):
            assert options[name] == "/audio"
        assert options["output_folder"] == "/run"
        assert options["verification_file"] is None
        assert options["speaker_folder"] is False
    assert "n_clusters" not in first and second["n_clusters"] == 7


def test_a_key_of_one_stage_goes_to_that_stage():
    first, second = parts(
        "--number_of_epochs=3", "--gated_epochs", "2", "--lr=0.1", "--debug"
    )
    assert first["number_of_epochs"] == "3" and second["gated_epochs"] == "2"
    assert "gated_epochs" not in first and "number_of_epochs" not in second
    assert first["lr"] == second["lr"] == "0.1"
    assert "debug" in first and "debug" in second


def test_a_given_encoder_takes_the_place_of_stage_1(tmp_path):
    """Stage I would train for an hour, and nothing would use it."""
    (only,) = parts("--pretrained_encoder=mine", "--lr=0.1")
    assert only["pretrained_encoder"] == "mine" and only["lr"] == "0.1"
    assert only["n_clusters"] == 7
    choices = {"preset": "small", "n_clusters": 7}
    arguments = tmp_path, tmp_path / "run", ["--pretrained_encoder=mine"]
    (parsed,), (settings,) = train.parse(choices, *arguments)
    assert settings.stage == 2 and parsed[-1][0] == "iter1/embeddings"
    for none in ("null", "~", ""):
        assert len(parts(f"--pretrained_encoder={none}")) == 2
    with pytest.raises(ValueError, match="--number_of_epochs is a setting of"):
        parts("--pretrained_encoder=mine", "--number_of_epochs=3")


def test_what_is_given_replaces_what_is_usual():
    first, second = parts("--trial_folder=/trials", "--n_clusters=50")
    assert first["trial_folder"] == second["trial_folder"] == "/trials"
    assert second["n_clusters"] == "50"


@pytest.mark.parametrize("preset", ["small", "paper"])
def test_a_clustering_may_say_itself_of_how_many_clusters(preset, tmp_path):
    choices = {"preset": preset, "n_clusters": 7}
    kmeans = "!new:lgl_plugin.clustering.kmeans.TorchKMeans"
    for cluster, n in (
        (f"{kmeans} [9]", 9),
        (
            f"{kmeans} {{n_clusters: !ref <n_clusters>}}",
            7,
        ),
    ):
        given = [f"--cluster={cluster}"]
        _, (_, second) = train.parse(choices, tmp_path, tmp_path / "run", given)
        assert second.cluster.n_clusters == n


def test_the_screen_counts_the_steps_of_both_stages(tmp_path):
    choices = {"preset": "small", "n_clusters": 7}
    rounds = ["--n_iterations=2"]
    folders = tmp_path, tmp_path / "run"
    (first, second), _ = train.parse(choices, *folders, rounds)
    assert first[-1] == second[-1]
    assert first[-1][0] == "baselines" and first[-1][-1] == "export/iter2"


@pytest.fixture
def hour(tmp_path):
    """Files that claim ten minutes each, though they are small."""
    folder = tmp_path / "audio"
    folder.mkdir()
    for n in range(30):
        soundfile.write(folder / f"{n}.flac", np.zeros(600 * 1000), 1000)
    return folder


def of(folder, run):
    """Settings that train on a folder."""
    names = ("train_folder", "data_folder")
    return types.SimpleNamespace(
        manifest=None, output_folder=run, **dict.fromkeys(names, folder)
    )


def test_the_preset_follows_from_the_files_and_the_gpu(
    hour, tmp_path, capsys, monkeypatch
):
    run, other = (of(hour, tmp_path / name) for name in ("run", "other"))
    assert train.survey(run) == (30, pytest.approx(5.0))
    chosen = train.choose(run, None)
    assert chosen == {"preset": "small", "n_clusters": "auto"}
    assert (
        "the preset small with an estimated number" in capsys.readouterr().out
    )
    # A run that was begun keeps its own, whatever the folder holds by now.
    monkeypatch.setattr(train, "LARGE", 30)
    (tmp_path / "run" / "state.json").touch()
    assert train.choose(run, None) == chosen
    again = train.choose(other, None, "cpu")
    assert again == chosen
    # A choice that no run was begun with is no choice.
    monkeypatch.setattr(sb_distributed, "infer_device", lambda: "cuda")
    again = train.choose(other, None)
    assert again == {"preset": "paper", "n_clusters": 3}
    saved = json.loads((tmp_path / "run" / train.CHOICES).read_text())
    assert saved == chosen


def test_a_preset_that_a_begun_run_refuses_is_not_its_next(hour, tmp_path):
    run = of(hour, tmp_path / "run")
    assert train.choose(run, None)["preset"] == "small"
    assert train.choose(run, "paper")["preset"] == "paper"
    (run.output_folder / "state.json").touch()
    assert train.choose(run, "small")["preset"] == "small"
    assert train.choose(run, None)["preset"] == "paper"


def test_a_manifest_decides_in_a_folder_of_any_name(tmp_path, monkeypatch):
    """Of shards, say, in which no audio file is to be found."""
    folder, run = tmp_path / "Tape #3: a=b", tmp_path / "run #1"
    folder.mkdir()
    manifest = tmp_path / "mine.csv"
    rows = [f"{n},3600,$data_root/{n}.wav,0,57600000," for n in range(40)]
    head = "ID,duration,wav,start,stop,spk_id"
    manifest.write_text("\n".join([head, *rows]))
    trained = []
    recipe = types.SimpleNamespace(train=lambda *words: trained.append(words))
    monkeypatch.setattr(train, "load_recipe", lambda: recipe)
    monkeypatch.setattr(train, "LARGE", 40)
    monkeypatch.setattr(sb_distributed, "infer_device", lambda: "cuda")
    words = [f"--output_folder={run}", f"--manifest={manifest}"]
    main(["train", str(folder), *words])
    saved = json.loads((run / train.CHOICES).read_text())
    assert saved == {"preset": "paper", "n_clusters": 4}
    assert len(trained) == 2
    for path, options, overrides, *_ in trained:
        settings, _ = load_settings(path, overrides, options)
        assert settings.manifest == str(manifest)
        assert settings.output_folder == str(run)
        for name in ("data_folder", "train_folder", "trial_folder"):
            assert getattr(settings, name) == str(folder)


@pytest.mark.parametrize(
    "option, message",
    [
        ("--bach_size=3", "did you mean 'batch_size'"),
        ("--gated_epoch=3", "did you mean 'gated_epochs'"),
        ("--lr=-1", "lr: -1"),
        ("stray", "'stray' belongs to no option"),
        ("--lr=1 --lr=2", "--lr is given twice"),
        ("--precision=fp17", "train: argument --precision: invalid choice"),
    ],
)
def test_wrong_keys_are_refused_before_anything_is_written(
    audio, tmp_path, capsys, option, message
):
    run = tmp_path / "run"
    with pytest.raises(SystemExit, match="2"):
        main(["train", str(audio), f"--output_folder={run}", *option.split()])
    assert message in capsys.readouterr().err
    assert not run.exists()


@pytest.mark.parametrize("verb", ["train", "check"])
def test_no_such_encoder(audio, tmp_path, capsys, monkeypatch, verb):
    """The advice is for this command, not for the recipe's script."""
    monkeypatch.setattr("sys.argv", ["/env/bin/lgl", verb])
    words = [verb, str(audio), f"--pretrained_encoder={tmp_path}/no.ckpt"]
    words.append(f"--output_folder={tmp_path}/run")
    with pytest.raises(SystemExit, match="2"):
        main(words)
    said = capsys.readouterr().err
    assert "no.ckpt: there is no encoder" in said
    assert "or leave it out, and Stage I" in said and "train_lgl" not in said
    assert not (tmp_path / "run").exists()


def test_the_list_of_an_embedded_folder_is_not_replaced(
    audio, tmp_path, capsys
):
    for name in ("manifest.csv", "vectors.npy"):
        (tmp_path / name).write_text("of `lgl embed`")
    with pytest.raises(SystemExit, match="2"):
        main(["train", str(audio), f"--output_folder={tmp_path}"])
    assert "holds embeddings of `lgl embed`" in capsys.readouterr().err
    assert (tmp_path / "manifest.csv").read_text() == "of `lgl embed`"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_of_shards_is_told_from_one_without_audio(tmp_path, capsys):
    (tmp_path / "shards.json").write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        main(["train", str(tmp_path), f"--output_folder={tmp_path}/run"])
    manifest = tmp_path / "manifest.csv"
    assert f"add --manifest={manifest}" in capsys.readouterr().err


def test_no_such_folder(tmp_path, capsys):
    run = tmp_path / "run"
    with pytest.raises(SystemExit, match="2"):
        main(["train", str(tmp_path / "no"), f"--output_folder={run}"])
    assert "is missing" in capsys.readouterr().err
    assert not run.exists()


def test_the_command_to_go_on_with_is_the_one_typed(monkeypatch):
    """A log and `lgl status` name it; it is `lgl`, not python's."""
    monkeypatch.setattr("sys.argv", ["/env/bin/lgl", "train", "my audio"])
    assert launch_command() == "lgl train 'my audio'"
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    torchrun = "torchrun --nproc_per_node=2 --nnodes=2"
    command = f"{torchrun} -m lgl_plugin train 'my audio'"
    assert launch_command() == command
    monkeypatch.undo()
    monkeypatch.setattr("sys.argv", ["train_lgl.py", "stage1.yaml"])
    assert launch_command() == "python train_lgl.py stage1.yaml"
