"""A small run folder, written by hand: no training behind it."""

import json

import numpy as np
import torch

from lgl_plugin.dataio.labels import write_labels
from lgl_plugin.dataio.manifest import Strings
from lgl_plugin.inference.store import Embeddings

SPEAKERS, EACH = 6, 10
N = SPEAKERS * EACH


def make_run(folder, seed=1, speakers=True, trials=True, rounds=2, gate="a"):
    """Writes a run of both stages and returns its folder.

    Without `speakers` the manifest names none; without `trials` the run had no
    trial list; `rounds` of Stage II, 0 for Stage I alone; `gate` is a setting.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    ids = [f"s{n // EACH}/{n}.wav" for n in range(N)]
    _manifest(folder, ids, speakers)
    _settings(folder, seed, rounds, gate, trials)
    records = []

    def after(path, rate, **record):
        """A phase's end."""
        if trials:
            _scores(folder / path, rng)
            record.update(eer=rate, min_dcf_001=rate / 30)
        records.append(record)

    after("baselines/floor.npz", 25.0, stage=0, phase="log-mel statistics")
    after("baselines/untrained.npz", 35.0, stage=0, phase="untrained")
    records += [_epoch(e, rng, stage=1, phase="simclr") for e in (1, 2)]
    after("stage1/scores.npz", 20.0, stage=1, phase="after simclr")
    for number in range(1, rounds + 1):
        there = folder / f"iter{number}"
        there.mkdir()
        clusters = np.arange(N) // EACH
        clusters[rng.random(N) < 0.2] = 0
        (there / "labels").mkdir()
        labels = torch.from_numpy(clusters)
        write_labels(there / "labels" / "labels.csv", ids, labels)
        vectors = np.eye(8)[clusters] + 0.1 * rng.normal(size=(N, 8))
        store = Embeddings(Strings(ids), vectors.astype(np.float32))
        store.save(there / "embeddings")
        place = dict(stage=2, iteration=number)
        agreement = dict(nmi=0.8, ami=0.7, purity=0.9, reliable_share=0.8)
        agreement = agreement if speakers else {}
        records.append(dict(**place, phase="clusters", seconds=3, **agreement))
        for phase, tau in (("classifier", np.inf), ("gated", 2.0)):
            losses = rng.gamma(2, 1, N).astype(np.float32)
            figures = dict(
                selected_share=float(np.mean(losses <= tau)),
                tau=tau if np.isfinite(tau) else None,
            )
            for epoch in (1, 2):
                record = _epoch(epoch, rng, **place, phase=phase, **figures)
                if speakers:
                    record |= dict(loss_reliable=1.0, loss_unreliable=3.0)
                records.append(record)
            (there / phase).mkdir()
            np.savez(
                there / phase / "gate.npz",
                rows=rng.permutation(N),
                losses=losses,
                selected=losses <= tau,
                tau=tau,
            )
            if speakers:
                figures |= dict(gate_precision=0.9, gate_recall=0.8)
                figures |= dict(nmi_selected=0.85)
            phase = dict(**place, phase=f"after {phase}", **figures)
            path = f"iter{number}/{phase['phase'][6:]}/scores.npz"
            after(path, 20.0 - 2 * number, **phase)
    lines = [json.dumps(record) + "\n" for record in records]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def _manifest(folder, ids, speakers):
    rows = ["ID,duration,wav,start,stop,spk_id"]
    for name in ids:
        speaker = name.split("/")[0] if speakers else ""
        rows.append(f"{name},2.0,$data_root/{name},0,32000,{speaker}")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")


def _settings(folder, seed, rounds, gate, trials):
    first = {"seed": seed, "manifest": None, "data_folder": "", "lr": 0.001}
    if trials:
        first["verification_file"] = str(folder.with_name("trials.txt"))
        # Targets within a speaker, as `_scores` has them, then between two.
        lines = [
            f"{n % 2 == 0:d} s{n % 6}/{n} s{(n + n % 2) % 6}/{n + 200}\n"
            for n in range(200)
        ]
        folder.with_name("trials.txt").write_text("".join(lines))
    settings = {"stage 1": first}
    done = {"baselines": {}, "stage1": {}}
    if rounds:
        gate = {"!new:lgl_plugin.nnet.gates.FixedGate": {"name": gate}}
        settings["stage 2"] = {**first, "n_iterations": rounds, "gate": gate}
    for number in range(1, rounds + 1):
        for step in ("embeddings", "labels", "classifier", "gated"):
            done[f"iter{number}/{step}"] = {}
    state = {"settings": settings, "done": done}
    state |= {name: {} for name in ("inputs", "sources", "failed", "files")}
    (folder / "state.json").write_text(json.dumps(state))


def _epoch(number, rng, **record):
    return dict(
        **record,
        epoch=number,
        loss=4.0 / number,
        pseudo_eer=20.0 / number,
        mean_cosine=0.25 / number,
        effective_dimensions=12.0,
        skipped_steps=0,
        utterances_per_second=float(rng.uniform(90, 110)),
        seconds=30.0,
    )


def _scores(path, rng):
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.arange(200) % 2 == 0
    scores = (rng.normal(size=200) + labels).astype(np.float32)
    np.savez(path, scores=scores, labels=labels)
