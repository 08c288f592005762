"""The paper's tables by the recipe's own command, on a tiny corpus."""

import functools
import importlib.util
import sys
import types
from unittest import mock

import experiments  # of the recipe's folder
import numpy as np
import pytest
import study  # of the recipe's folder
import torch
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import adjusted_rand_score
from study import average_to
from tiny import RECIPE, STAGE1, STAGE2, TINY, run_script

from lgl_plugin.dataio.manifest import load_manifest
from lgl_plugin.nnet.features import Waveform
from lgl_plugin.runs.metrics_log import read_metrics
from lgl_plugin.runs.run import Run
from lgl_plugin.runs.weights import ENCODER
from lgl_plugin.training.session import sample_rows

spec = importlib.util.spec_from_file_location("paper", RECIPE / "paper.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
spread, stop, ten_speakers = script.spread, script.stop, script.ten_speakers

# As in the paper's preset, iteration 2 is the last and has its own encoder.
WIDE = (
    "--new_last_encoder=!name:lgl_plugin.nnet.encoders.Encoder "
    "{features: !ref <compute_features>, normalise: !ref <mean_var_norm>, "
    "network: !name:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN "
    "{input_size: 80, channels: [24, 24, 24, 24, 72], lin_neurons: 192}}"
)
# A wide encoder has no centroids to begin with: the preset's random classifier.
WIDE_STAGE2 = [*(o for o in STAGE2 if "classifier_init" not in o), WIDE]


def paper(names, folder, corpus, *options):
    """Runs paper.py with one seed."""
    typed = [
        *("paper.py", *names),
        *("--small", "--seeds=1", f"--output_folder={folder}"),
        *TINY,
        *STAGE1,
        *WIDE_STAGE2,
        f"--data_folder={corpus}",
        f"--train_folder={corpus}/wav",
        f"--trial_folder={corpus}/wav",
        *options,
    ]
    with mock.patch.object(sys, "argv", typed):
        script.main()


@pytest.fixture
def in_processes(monkeypatch):
    """Each run has a process of its own, as a user's."""
    monkeypatch.setattr(experiments, "run_command", RUN_COMMAND)


RUN_COMMAND = experiments.run_command


@pytest.fixture(scope="module", autouse=True)
def started():
    """Runs are in this process and without a page; the list of them."""
    runs = []

    def start(command, printed, threads):
        runs.append(printed.parent.name)
        run_script(*command[1:])

    page = "lgl_plugin.report.build.try_to_write_report"
    with (
        mock.patch.object(experiments, "run_command", start),
        mock.patch(page, id),
    ):
        yield runs


@pytest.fixture(scope="module")
def tables(corpus, tmp_path_factory, started):
    """A folder with what can be had of two short runs."""
    folder = tmp_path_factory.mktemp("paper")
    names = ["table1", "table2", "figure3", "selection"]
    names += ["study", "backends", "clusterings"]
    lists = f"--lists=own={corpus}/trials.txt@{corpus}/wav"
    paper(names, folder, corpus, lists)
    return folder


def load_state(path):
    return torch.load(path, weights_only=True)


def rows(folder, name):
    """A table's cells by the first one of each row."""
    lines = (folder / f"{name}.md").read_text().splitlines()
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in lines]
    return {row[0]: row[1:] for row in cells if row}


def test_table2_is_what_the_runs_logged(tables):
    found = rows(tables, "table2")
    for label, name in (("with", "base"), ("without", "without-gate")):
        for iteration in (1, 2):
            (eer,) = (
                record["eer"]
                for record in read_metrics(tables / "seed1" / name)
                if record["phase"] == "after gated"
                and record["iteration"] == iteration
            )
            assert found[f"{label} the gate"][iteration - 1] == f"{eer:.1f}"


def test_table1_scores_the_encoders_anew(tables):
    """On the run's own list: what the run itself found."""
    shown = rows(tables, "table1")["Stage II, with the gate"][0]
    assert shown == rows(tables, "table2")["with the gate"][1]


def logged(folder, name, **where):
    """The one record of a run that says so."""
    (found,) = (
        record
        for record in read_metrics(folder / "seed1" / name)
        if where.items() <= record.items()
    )
    return found


def test_the_study_is_what_the_runs_logged(tables):
    found = rows(tables, "study")
    for label, name, phase in (
        ("Stage I", "base", "after simclr"),
        ("true labels", "ceiling", "after true labels"),
    ):
        record = logged(tables, name, phase=phase)
        eers = (record["eer"], record["eer_backend"], record["eer_as_norm"])
        assert found[label][:3] == [f"{eer:.1f}" for eer in eers]
        assert found[label][3] == f"{record['min_dcf_001']:.3f}"


def test_a_ceiling_starts_at_stage_one_and_takes_all_rounds_steps(tables):
    run = tables / "seed1" / "ceiling"
    epochs = [r for r in read_metrics(run) if r["phase"] == "true labels"]
    assert [r["epoch"] for r in epochs] == [1, 2, 3, 4]  # 2 rounds of 1 + 1
    of_rounds = [r for r in read_metrics(tables / "seed1/base") if "lr" in r]
    assert len(epochs) == sum(r["stage"] == 2 for r in of_rounds)
    start, end = (
        load_state(run / step / "embedding_model.ckpt")
        for step in ("stage1", "ceiling")
    )
    base = load_state(tables / "seed1/base/stage1/embedding_model.ckpt")
    assert all(start[key].equal(base[key]) for key in base)
    moved = [
        (end[key] - start[key]).norm() / start[key].norm()
        for key in start
        if key.endswith("conv.weight")
    ]
    assert 0 < max(moved) < 1  # from other random weights: about 1.4


def test_back_ends_are_fitted_on_the_sample_of_the_records():
    """Of more utterances than that takes."""
    embedder = object.__new__(study.Embedder)
    embedder.step = types.SimpleNamespace(
        manifest=range(2500),
        model=types.SimpleNamespace(settings={"seed": 3}),
    )
    embedder.extract = types.SimpleNamespace(
        embed_all=lambda manifest, rows: rows
    )
    np.testing.assert_array_equal(embedder.sample, sample_rows(2500, seed=3))


def test_backends_are_those_of_the_records(tables):
    first, *_ = (tables / "backends.md").read_text().split("\n\n")
    found = {
        row.split("|")[1].strip(): [c.strip() for c in row.split("|")[2:-1]]
        for row in first.splitlines()
    }
    header = found["EER %"]
    record = logged(tables, "base", phase="after simclr")
    own = dict(zip(header, found["stage1"]))
    assert own["cosine"] == f"{record['eer']:.1f}"
    assert own["whitened, 10"] == f"{record['eer_backend']:.1f}"
    assert own["AS-norm"] == f"{record['eer_as_norm']:.1f}"
    assert {"log-mel statistics", "untrained", "iter2/gated"} <= found.keys()
    both = float(own["with log-mel statistics"])
    assert both != float(own["cosine"]) and 0 < both < 60
    baseline = dict(zip(header, found["log-mel statistics"]))
    record = logged(tables, "base", phase="log-mel statistics")
    assert baseline["whitened, 0.1"] == f"{record['eer']:.1f}"


def test_clusterings_of_each_encoder(tables):
    text = (tables / "clusterings.md").read_text()
    told = [row for row in text.splitlines() if "| yes |" in row]
    # Raw, whitened, with log-mel statistics and made twice, of untrained and
    # five; two of the log-mel statistics.
    assert len(told) == 4 * 6 + 2
    assert all(row.split("|")[4].strip() == "5" for row in told)
    assert "estimate / speakers" in text


@pytest.mark.parametrize("n_clusters", [1, 3, 10, 40])
def test_average_linkage_to_a_number(n_clusters):
    points = np.random.default_rng(0).normal(size=(40, 8))
    found = average_to(points, n_clusters)
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    expected = AgglomerativeClustering(
        n_clusters, metric="cosine", linkage="average"
    ).fit_predict(unit)
    assert adjusted_rand_score(expected, found) == 1.0


def test_finished_runs_need_no_experiment(tables, corpus, tmp_path):
    run = tables / "seed1" / "base"
    paper(["backends"], tmp_path, corpus, f"--runs={run}")
    expected = (tables / "backends.md").read_text()
    assert (tmp_path / "backends.md").read_text() == expected


def test_finished_runs_have_data_of_their_own(tmp_path):
    """No setting is read, which without a data_folder would be refused."""
    Run(tmp_path, 1, {}).save()
    options = types.SimpleNamespace(runs=[tmp_path], lists=[])
    script.check_data(["backends", "clusterings"], None, options)


def test_runs_with_and_without_the_gate_share_what_came_before(tables):
    for phase in ("clusters", "after classifier"):
        with_gate, without = (
            [
                r
                for r in read_metrics(tables / "seed1" / n)
                if r["phase"] == phase
            ]
            for n in ("base", "without-gate")
        )
        assert with_gate[0] == without[0]


def test_one_round_of_a_base_with_a_wide_last_encoder(tables, corpus):
    """Iteration 1 goes on with the encoder that the base left there."""
    options = [
        *TINY,
        *WIDE_STAGE2,
        f"--data_folder={corpus}",
        f"--train_folder={corpus}/wav",
        f"--trial_folder={corpus}/wav",
    ]
    yamls = [RECIPE / f"hparams/small_stage{stage}.yaml" for stage in (1, 2)]
    experiment = script.Experiment(
        RECIPE / "train_lgl.py", yamls, tables, [1], options=options
    )
    variant = script.Variant(
        "one-round",
        (*script.GATES["share"], *script.FIRST),
        script.CLASSIFIED,
    )
    experiment.train_one(1, variant)
    before, after = (
        load_state(tables / f"seed1/{name}/iter1/gated/embedding_model.ckpt")
        for name in ("base", "one-round")
    )
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.shape == after[name].shape, name


REUSED = (script.backends, script.clusterings)  # they train nothing


class Trained(Exception):
    """Something was trained."""


@pytest.mark.parametrize(
    "function",
    sorted({*script.ALL} - {*REUSED}, key=str),
    ids=lambda f: f.__name__,
)
def test_fewer_rounds_take_no_wide_encoder(function, tmp_path, monkeypatch):
    """Else a round that was kept, or is compared, would be of another width."""
    yamls = [RECIPE / f"hparams/stage{stage}.yaml" for stage in (1, 2)]
    experiment = script.Experiment(
        RECIPE / "train_lgl.py",
        yamls,
        tmp_path,
        [1],
        options=["--data_folder=x"],
    )
    assert experiment.settings["new_last_encoder"]

    def train(variants):
        for variant in variants:
            rounds = [o for o in variant.options if "--n_iterations" in o]
            if rounds:
                assert "--new_last_encoder=null" in variant.options
        if variants:
            raise Trained

    monkeypatch.setattr(experiment, "train", train)
    monkeypatch.setattr(script, "ten_speakers", lambda *paths: None)
    with pytest.raises(Trained):
        function(experiment, None)


def test_selection_names_every_criterion(tables):
    names = set(rows(tables, "selection"))
    assert {"pseudo_trials", "silhouette", "agreement", "loss"} <= names


def test_figures_are_drawn(tables):
    assert (tables / "figure3.svg").stat().st_size > 1000


def test_what_is_done_is_not_done_again(tables, corpus, started):
    before = started.copy()
    assert before.count("base") == 2 and before.count("without-gate") == 1
    paper(["table2"], tables, corpus)
    assert started == before


@pytest.mark.usefixtures("in_processes")
def test_a_failing_run_says_why(corpus, tmp_path, capsys):
    with pytest.raises(SystemExit):
        paper(["table2"], tmp_path, corpus, "--manifest=/absent.csv")
    error = capsys.readouterr().err
    assert "\nRuntimeError: " in error and "/absent.csv" in error


def test_a_wrong_value_of_stage_2_is_refused_before_stage_1(
    corpus, tmp_path, capsys, started
):
    before = started.copy()
    with pytest.raises(SystemExit):
        paper(["table2"], tmp_path, corpus, "--min_cluster_size=0")
    assert started == before
    assert "min_cluster_size: 0 should be" in capsys.readouterr().err


@pytest.mark.parametrize(
    "typed, problem",
    [
        (["--gated_epoch=3"], "--gated_epoch; did you mean 'gated_epochs'?"),
        (["--lr", "3"], "3: give settings as --key=value"),
    ],
)
def test_a_mistyped_option_is_refused_at_once(tmp_path, capsys, typed, problem):
    """Also where nothing would be trained with it."""
    with pytest.raises(SystemExit):
        paper(["backends"], tmp_path, "/audio", *typed)
    assert problem in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_refused_at_once(tmp_path, capsys):
    with pytest.raises(SystemExit):
        paper(["backends"], tmp_path, "/audio", f"--runs={tmp_path}/no")
    assert f"{tmp_path}/no holds no state.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "names, options, problem",
    [
        (["table1"], [], "give --lists NAME=trial_list@audio_folder"),
        (["table1"], ["--lists=own=list.txt"], "give --lists NAME=trial_list@"),
        (["table1"], ["--lists=own=absent@/audio"], "there is no file absent"),
        (["steps"], ["--verification_file=absent"], "there is no file /"),
        *(
            ([name], ["--verification_file=null"], f"{name}: there is no")
            for name in ("table2", "steps", "study", "backends")
        ),
        *(
            ([name], ["--speaker_folder=False"], f"{name}: there are no true")
            for name in ("figure2", "clusterings")
        ),
        # Not after what stands before it, either.
        (["clusterings", "table1"], [], "give --lists"),
    ],
)
def test_data_that_lack_something_are_refused_before_any_training(
    tmp_path, capsys, monkeypatch, names, options, problem
):
    monkeypatch.setattr(script.Experiment, "train", pytest.fail)
    with pytest.raises(SystemExit):
        paper(names, tmp_path, "/audio", *options)
    assert problem in capsys.readouterr().err


def test_encoders_that_backends_compares(monkeypatch, tmp_path):
    """None that is untrained where a pre-trained network takes waveforms."""
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1" / ENCODER).touch()
    state = {"done": ["stage1"], "settings": {}}
    monkeypatch.setattr(study, "read_state", lambda run: state)
    options = types.SimpleNamespace(runs=[tmp_path])
    on_cpu, asked = types.SimpleNamespace(device="cpu"), set()
    for features, untrained in (
        (Waveform(), []),
        (None, [study.UNTRAINED]),
    ):
        encoder = types.SimpleNamespace(features=features)
        extract = types.SimpleNamespace(encoder=encoder)

        def embedder_of(run, name, device, extract=extract):
            asked.add(device)
            return types.SimpleNamespace(name=name, extract=extract)

        monkeypatch.setattr(study, "embedder_of", embedder_of)
        found = [each.name for each in study.embedders(on_cpu, options)]
        assert found == [study.LOG_MEL_STATISTICS, *untrained, "stage1"]
    assert asked == {"cpu"}
    state["done"] = []
    with pytest.raises(ValueError, match="has trained no encoder yet"):
        next(study.embedders(on_cpu, options))


@pytest.mark.usefixtures("in_processes")
def test_a_run_prints_into_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "settings_of", id)  # no whole yamls
    recipe, yamls = tmp_path / "recipe.py", []
    recipe.write_text("import sys; print(*sys.argv[1:])")
    for name in ("stage1.yaml", "stage2.yaml"):
        yamls.append(tmp_path / name)
        yamls[-1].write_text("crop_seconds: 3.0")
    options = ["--crop_seconds=2.0"]
    make = functools.partial(
        script.Experiment, recipe, yamls, tmp_path / "runs", [1, 2], 2, options
    )
    for experiment in (make(), make()):  # the second finds all done
        experiment.train([])
        for seed in experiment.seeds:
            folder = experiment.run_folder(seed)
            first, second = (folder / "printed.txt").read_text().splitlines()
            end = f"--output_folder={folder} --seed={seed}"
            assert first.startswith(f"{yamls[0]} {end} --selection_study=True")
            assert second == f"{yamls[1]} {end} --crop_seconds=2.0"


def test_mean_and_range():
    assert spread([1.0, 2.0, 6.0]) == "3.0 (1.0 to 6.0)"
    assert spread([0.254], 100, 0) == "25"
    assert spread([-0.01, 0.01]) == "0.0 (0.0 to 0.0)"
    assert spread([None, float("nan")]) == ""
    # Else a mean of two seeds would pass for one of three.
    assert spread([1.0, None, 3.0]) == "2.0 (1.0 to 3.0) [2 of 3]"


def test_patience():
    assert stop([5, 4, 6, 7, 1], patience=2) == 4
    assert stop([5, 4, 6, 3, 4], patience=2) == 5
    assert stop([np.inf, 5, 4], patience=1) == 1


@pytest.mark.parametrize("given", ["mine.csv", None])
def test_ten_speakers_of_a_manifest(tmp_path, given):
    """Of the user's own, or of the one that the run made."""
    lines = ["ID,duration,wav,start,stop,spk_id"]
    for speaker in range(12):
        for n in range(98 + speaker):
            lines.append(f"{speaker}-{n},1.0,a.wav,0,16000,s{speaker}")
    source = tmp_path / (given or "manifest.csv")
    source.write_text("\n".join(lines))

    def train(variants):
        if variants:  # the toy's, of the manifest that was just written
            assert "--manifest=<base>/ten_speakers.csv" in variants[0].options
            # Stage II's start, not the encoder before the positives.
            start = "--pretrained_encoder=<base>/ssps"
            assert start in variants[0].options
            raise Trained

    experiment = types.SimpleNamespace(
        settings={"manifest": given and source},
        seeds=[1],
        run_folder=lambda seed: tmp_path,
        stage1_step="ssps",
        train=train,
    )
    with pytest.raises(Trained):
        script.figure2(experiment, None)
    found = load_manifest(tmp_path / "ten_speakers.csv", "")
    assert np.bincount(found.speakers).tolist() == [100] * 10
    assert {name.split("-")[0] for name in found.ids}.isdisjoint({"0", "1"})


def test_ten_speakers_must_be_known(tmp_path):
    header = "ID,duration,wav,start,stop,spk_id\n"
    source = tmp_path / "manifest.csv"
    source.write_text(header + "a,1.0,a.wav,0,16000,\n")
    with pytest.raises(ValueError, match="names 0"):
        ten_speakers(source, tmp_path / "ten_speakers.csv")
