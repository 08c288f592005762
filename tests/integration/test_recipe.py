"""The recipe from end to end, as a user starts it, on a tiny corpus."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import yaml
from experiments import CLASSIFIED
from tiny import STAGE1, STAGE2, train, train_here

from lgl_plugin.cli.main import main
from lgl_plugin.dataio import labels, manifest
from lgl_plugin.dataio.labels import read_labels
from lgl_plugin.inference.backends import load_backend
from lgl_plugin.inference.export import export
from lgl_plugin.inference.store import Embeddings
from lgl_plugin.runs.metrics_log import RESERVED, read_metrics, summarise
from lgl_plugin.runs.run import fork
from lgl_plugin.training.epoch_selection import CRITERIA
from lgl_plugin.training.health import findings
from lgl_plugin.utils.files import checksum
from lgl_plugin.utils.signals import stop


def test_rows_of_the_run(run):
    """Every phase is scored, in the pipeline's order."""
    rows = summarise(read_metrics(run))
    for row in rows.values():
        assert {"eer", "eer_backend", "eer_as_norm"} <= row.keys()
        assert {"min_dcf_001_backend", "min_dcf_001_as_norm"} <= row.keys()
    for place in ("stage1", "iter1/classifier", "iter2/gated"):
        backend = load_backend(run / place / "backend.npz")
        assert backend.projection.shape == (192, 192)
    assert list(rows) == [
        "log-mel statistics",
        "untrained",
        "Stage I",
        "iteration 1, classifier",
        "iteration 1, gated",
        "iteration 2, classifier",
        "iteration 2, gated",
    ]


def test_metrics_are_complete_json(run):
    """Epochs log what the contract names; nothing but numbers or null."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    epochs = [r for r in records if r.get("epoch")]
    assert len(epochs) == 2 + 2 * 2
    for record in epochs:
        assert record["utterances_per_second"] > 0
        assert math.isfinite(record["loss"])
        assert 0 <= record["accuracy"] <= 1
        assert record["pseudo_eer"] >= 0
        assert "eer" not in record  # the trial list decides nothing
    # Of Stage I the method's own figures alone have names that are not taken.
    assert epochs[0].keys() - RESERVED == {"accuracy"}
    for record in epochs[2:]:
        assert 0 <= record["selected_share"] <= 1
        assert "tau" in record
        assert record["loss_reliable"] > 0


def test_a_run_that_went_well_raises_no_warning(run):
    records = read_metrics(run)
    assert not findings(records)
    for record in records:
        if record.get("epoch"):
            assert -1 <= record["mean_cosine"] <= 1
            assert record["effective_dimensions"] >= 1
        if record["phase"] == "clusters":
            assert 0 < record["largest_share"] < 1
            assert record["empty_clusters"] == 0


def test_held_out_speakers_are_not_trained_on(run, corpus):
    """No speaker of the trial list is in the manifest."""
    tested = {
        path.split("/")[0]
        for line in (corpus / "trials.txt").read_text().splitlines()
        for path in line.split()[1:]
    }
    manifest = (run / "manifest.csv").read_text()
    assert tested and not [s for s in tested if f"{s}/" in manifest]


def test_pseudo_labels_cover_the_embeddings(run):
    """Every embedded utterance has a label in 0..K-1; K is on record."""
    found = Embeddings.load(run / "iter1" / "embeddings")
    names, labels = read_labels(run / "iter1" / "labels" / "labels.csv")
    facts = json.loads((run / "iter1/labels/labels.json").read_text())
    assert names == found.utterances
    assert set(labels.tolist()) == set(range(facts["n_clusters"]))
    assert len(facts["encoder"]) == 64


def test_training_moved_the_encoder_and_left_it_finite(run):
    """Stage I's, the classifier's and the gate's encoders all differ."""
    folders = ("stage1", "iter1/classifier", "iter1/gated")
    encoders = [
        torch.load(run / f / "embedding_model.ckpt", weights_only=True)
        for f in folders
    ]
    key = "fc.conv.weight"
    for first, second in zip(encoders, encoders[1:]):
        assert not torch.equal(first[key], second[key])
    for encoder in encoders:
        assert all(v.isfinite().all() for v in encoder.values())


def test_finished_run_is_not_repeated(run, corpus):
    """The same command again trains nothing."""
    before = (run / "metrics.jsonl").read_bytes()
    train_here("small_stage2.yaml", corpus, run, *STAGE2)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_interrupted_run_repeats_only_the_lost_step(run, corpus, tmp_path):
    """With the last step not done, it alone runs, to the same result."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    state = json.loads((copy / "state.json").read_text())
    del state["done"]["iter2/gated"], state["checksum"]
    (copy / "state.json").write_text(json.dumps(state))
    shutil.rmtree(copy / "iter2" / "gated")
    before = read_metrics(run)
    train_here("small_stage2.yaml", corpus, copy, *STAGE2)
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    again = [json.loads(line) for line in lines[len(before) :]]
    assert {r["phase"] for r in again} == {"gated", "after gated"}
    assert again[-1]["eer"] == before[-1]["eer"]


def test_same_seed_same_run(run, corpus, tmp_path):
    """Stage I in another process gives the same weights bit for bit."""
    train("small_stage1.yaml", corpus, tmp_path, *STAGE1)
    first, second = (
        torch.load(f / "stage1" / "embedding_model.ckpt", weights_only=True)
        for f in (run, tmp_path)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_report_prints_a_row_for_each_phase(run, capsys):
    """The table and the figure of the README's command."""
    main(["report", str(run)])
    printed = capsys.readouterr().out
    assert "| iteration 2, gated |" in printed
    assert (run / "report" / "error_rate_by_phase.png").stat().st_size > 1000


def test_debug_leaves_no_trace_in_the_run(run, corpus):
    """--debug neither counts as done nor adds to the metrics."""
    before = (run / "metrics.jsonl").read_bytes()
    state = (run / "state.json").read_bytes()
    train_here("small_stage1.yaml", corpus, run, *STAGE1, "--debug")
    assert not stop.keeps  # or a signal would have said to go on
    assert (run / "metrics.jsonl").read_bytes() == before
    assert (run / "state.json").read_bytes() == state


def test_gate_and_scores_are_kept(run):
    """What the report draws: each phase's losses, selection and scores."""
    n_trials = len(np.load(run / "stage1" / "scores.npz")["labels"])
    for phase in ("iter1/classifier", "iter2/gated"):
        scores = np.load(run / phase / "scores.npz")
        assert scores["scores"].shape == scores["labels"].shape == (n_trials,)
        gate = np.load(run / phase / "gate.npz")
        assert len(gate["rows"]) == len(gate["losses"]) == len(gate["selected"])
    assert gate["selected"].mean() == pytest.approx(
        read_metrics(run)[-1]["selected_share"]
    )


def test_fork_trains_only_what_differs(run, corpus, tmp_path):
    """Without the gate, from the same classifier; then finer with a margin."""
    steps = [*CLASSIFIED, "iter1/gated", "iter2/embeddings", "iter2/labels"]
    steps += ["iter2/classifier", "iter2/gated"]
    fork(run, tmp_path, steps)
    assert read_metrics(tmp_path) == read_metrics(run)
    train_here(
        "small_stage2.yaml",
        corpus,
        tmp_path,
        *STAGE2,
        "--large_margin_epochs=1",
        "--large_margin_crop_seconds=0.8",
        # The gate may select fewer utterances than a usual batch has.
        "--batch_size=2",
    )
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    again = [json.loads(line) for line in lines[len(read_metrics(run)) :]]
    assert [r["phase"] for r in again] == ["large_margin", "after large_margin"]
    # Fine-tuned on what the gate selected last.
    used = np.load(tmp_path / "iter2/large_margin/gate.npz")["rows"]
    assert set(used) <= set(np.load(run / "iter2/gated/gate.npz")["passed"])


def test_dlg_lc_corrects_labels(run, corpus, tmp_path):
    """The dynamic gate with label correction, by overrides."""
    fork(run, tmp_path, CLASSIFIED)
    train_here(
        "small_stage2.yaml",
        corpus,
        tmp_path,
        *STAGE2,
        "--n_iterations=1",
        "--gate=!new:lgl_plugin.nnet.gates.FixedGate [0.01]",
        "--correct_labels={confidence: 0.1}",
    )
    last = read_metrics(tmp_path)[-1]
    assert last["selected_share"] < 0.5
    corrected = np.load(tmp_path / "iter1/gated/gate.npz")["corrected"]
    assert (corrected >= 0).any() and 0 <= last["correction_precision"] <= 1


def test_audio_of_unknown_speakers(corpus, stage1_run, tmp_path):
    """Nothing asks for labels that are not there, corrected ones neither."""
    train_here(
        "small_stage2.yaml",
        corpus,
        tmp_path,
        *STAGE2,
        "--n_iterations=1",
        "--speaker_folder=False",
        "--verification_file=null",
        "--gate=!new:lgl_plugin.nnet.gates.FixedGate [0.01]",
        "--correct_labels={confidence: 0.1}",
        f"--pretrained_encoder={stage1_run}/stage1",
        page=True,
    )
    last = read_metrics(tmp_path)[-1]
    assert last["corrected_share"] > 0
    assert not {"correction_precision", "nmi_selected", "eer"} & set(last)
    assert (tmp_path / "report" / "index.html").exists()
    assert (tmp_path / "export" / "iter1" / "README.md").exists()


def test_every_criterion_is_logged_for_the_study(corpus, stage1_run, tmp_path):
    """And the run goes the same way as without looking."""
    options = [*STAGE1, "--selection_study=True"]
    train_here("small_stage1.yaml", corpus, tmp_path, *options)
    epochs = [r for r in read_metrics(tmp_path) if r["phase"] == "simclr"]
    for figure, _ in CRITERIA.values():
        assert figure in epochs[1]
    assert epochs[0]["agreement"] is None and epochs[1]["agreement"] is not None
    blind = [r for r in read_metrics(stage1_run) if r["phase"] == "simclr"]
    assert [r["loss"] for r in epochs] == [r["loss"] for r in blind]


def test_stage1_changes_the_speed_of_what_it_trains_on(
    corpus, stage1_run, tmp_path
):
    options = [*STAGE1, "--speeds=[80]"]
    train_here("small_stage1.yaml", corpus, tmp_path, *options)
    changed, plain = (
        next(r["loss"] for r in read_metrics(run) if r["phase"] == "simclr")
        for run in (tmp_path, stage1_run)
    )
    assert changed != plain


def test_shards_train_as_files_do(corpus, stage1_run, tmp_path):
    """The same utterances are read: alike in what no order of them changes."""
    manifest = stage1_run / "manifest.csv"
    shards = tmp_path / "shards"
    options = [f"--data_root={corpus}", "--shard_mb=0.2", "--num_workers=1"]
    main(["pack", str(manifest), str(shards), *options])
    assert len(list(shards.glob("*.tar"))) > 3
    train_here(
        "small_stage1.yaml",
        corpus,
        tmp_path / "run",
        f"--manifest={shards}/manifest.csv",
        f"--data_folder={shards}",
        f"--verification_file={corpus}/trials.txt",
        "--number_of_epochs=1",
        "--ssps_epochs=0",
    )
    # Moved, and named when the run is started again: its export finds them.
    now = shards.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="If it has moved"):
        export(tmp_path / "run", folder=tmp_path / "export")
    train_here(
        "small_stage1.yaml",
        corpus,
        tmp_path / "run",
        f"--manifest={now}/manifest.csv",
        f"--data_folder={now}",
        f"--verification_file={corpus}/trials.txt",
        "--number_of_epochs=1",
        "--ssps_epochs=0",
    )
    export(tmp_path / "run", folder=tmp_path / "export")
    before, after = (
        [json.loads(line) for line in (run / "metrics.jsonl").open()]
        for run in (stage1_run, tmp_path / "run")
    )
    # The baseline is whitened on the training set; then the untrained encoder.
    # Cosines of float32 may round otherwise where memory is aligned otherwise.
    for one, other in zip(before[:2], after[:2], strict=True):
        assert one.pop("phase") == other.pop("phase")
        assert other == pytest.approx(one, rel=1e-6)
    assert after[2]["phase"] == "simclr" and after[2]["loss"] > 0
    assert after[-1]["phase"] == "after simclr"


def test_pseudo_trials_may_choose_the_epoch(corpus, tmp_path):
    """And SpeechBrain's own train logger hears of each."""
    log = tmp_path / "train.txt"
    options = [
        *STAGE1,
        "--selection=pseudo_trials",
        "--train_logger=!new:speechbrain.utils.train_logger.FileTrainLogger "
        f"[{log}]",
    ]
    train_here("small_stage1.yaml", corpus, tmp_path, *options)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    rates = [r["pseudo_eer"] for r in records if r["phase"] == "simclr"]
    kept = [
        yaml.safe_load(path.read_text())["criterion"]
        for path in (tmp_path / "stage1").glob("checkpoints/*/CKPT.yaml")
    ]
    assert len(rates) == 2 and min(kept) == min(rates)
    lines = log.read_text().splitlines()
    assert len(lines) == 2 and "train stage1/loss" in lines[1]


def test_stage2_starts_from_positives_of_other_utterances(
    corpus, tmp_path, capsys
):
    """SSPS is a step of its own; the report, the status, the export know it."""
    options = [STAGE1[0], "--ssps_epochs=2", "--ssps_cluster_epochs=1"]
    options.append("--lr_annealing={warmup: 0.0}")
    train_here("small_stage1.yaml", corpus, tmp_path, *options)
    records = read_metrics(tmp_path)
    assert list(summarise(records))[-2:] == ["Stage I", "Stage I, SSPS"]
    first, second = (r for r in records if r["phase"] == "ssps")
    assert min(first["substituted_share"], second["substituted_share"]) > 0.5
    assert 0 <= second["same_speaker_share"] <= 1
    assert second["lr"] < first["lr"] < records[2]["lr"]
    main(["status", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "3 of 3 steps are done" in printed and "ssps: EER" in printed
    card = (tmp_path / "export" / "ssps" / "README.md").read_text()
    assert "Stage I, SSPS" in card
    options = [*STAGE2, "--n_iterations=1"]
    train_here("small_stage2.yaml", corpus, tmp_path, *options, page=True)
    state = json.loads((tmp_path / "state.json").read_text())
    weights = checksum(tmp_path / "ssps" / "embedding_model.ckpt")
    assert state["sources"]["iter1/embeddings"] == weights
    assert "SSPS" in (tmp_path / "report" / "index.html").read_text()


def test_too_few_utterances_for_clusters_are_refused_at_once(corpus, tmp_path):
    options = ["--ssps_epochs=1", "--ssps_cluster={n_clusters: 1000}"]
    with pytest.raises(ValueError, match="ssps_cluster: .*lower n_clusters"):
        train_here("small_stage1.yaml", corpus, tmp_path, *options)
    assert not (tmp_path / "stage1" / "embedding_model.ckpt").exists()


def test_files_are_parsed_once(stage1_run, corpus, tmp_path, monkeypatch):
    """A million rows take seconds each time, and every step reads them."""
    manifest._parse.cache_clear()
    labels._parse.cache_clear()
    given = f"--pretrained_encoder={stage1_run}/stage1"
    train_here("small_stage2.yaml", corpus, tmp_path, *STAGE2, given, page=True)
    assert (tmp_path / "report" / "index.html").exists()
    assert manifest._parse.cache_info().misses == 1
    # Of two rounds, and read again by reports and by the round after.
    assert labels._parse.cache_info().misses <= 6
