"""Adapts an encoder to unlabelled audio, step by step, for `lgl adapt`.

Each step is a rung of the ladder; the cheapest is tried first. The first rung
subtracts the mean of the audio's embeddings (centring). The second gives all
directions similar variance (whitening). The third, on request, trains the
whole network through the loss gate; for this a user may label a few
recordings. A rung is kept only if its verdict is "better", so that none may be
kept. Training is judged by clusters that it did not read.

Back-ends are fitted on the recordings that they are judged by. With half of
the recordings to fit and half to judge, a tenth as many gains were seen
(docs/adapt_measured.md). A mean and heavily shrunk variances hardly overfit to
single recordings.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import pathlib
import sys
from collections.abc import Callable, Sequence

import numpy as np
from speechbrain.utils.logger import get_logger

from lgl_plugin.adaptation.rungs import (
    BACKENDS,
    HEADER,
    SPLIT,
    START,
    TRAINED,
    Rung,
    steps_of,
)
from lgl_plugin.adaptation.split import kept_out
from lgl_plugin.adaptation.verdict import (
    FEWEST,
    RULE,
    Verdict,
    check_enough,
    count_speakers,
    judge,
)
from lgl_plugin.dataio.bad_files import BadFiles
from lgl_plugin.dataio.folder import refuse_recordings
from lgl_plugin.dataio.given import COLUMNS, read_given
from lgl_plugin.dataio.manifest import write_part
from lgl_plugin.inference.backends import Backend, load_backend
from lgl_plugin.inference.calibration import (
    THRESHOLD,
    kept_threshold,
    threshold_by_halves,
)
from lgl_plugin.inference.extractor import load_extractor
from lgl_plugin.inference.folder import (
    list_folder,
    other_channel,
    refuse_foreign,
)
from lgl_plugin.inference.inference_model import InferenceModel
from lgl_plugin.inference.model_card import adapted_card
from lgl_plugin.inference.store import Embeddings
from lgl_plugin.runs.lock import lock_folder
from lgl_plugin.runs.pretrained import encoder_files, encoder_settings
from lgl_plugin.runs.provenance import record_start
from lgl_plugin.runs.run import Run
from lgl_plugin.runs.state import ADAPTATION, STATE, digest, read_state
from lgl_plugin.runs.weights import BACKEND, ENCODER, load_weights, save_weights
from lgl_plugin.utils.device import check_device
from lgl_plugin.utils.files import checksum, load_arrays, save_arrays
from lgl_plugin.utils.signals import stop
from lgl_plugin.utils.tables import write_csv

logger = get_logger(__name__)

# The most recordings that the verdict uses, that a back-end is fitted on, and
# that are listed to find the threshold. Of the last every second one is used,
# cut into halves.
JUDGED, FITTED, HALVED = 4000, 20000, 1000
ROWS = "rows.npz"
# Files and folders that are replaced, beside those of steps.
MADE = ("manifest.csv", "bad_files.txt", "report/index.html", "export/adapted")
# The share of the recordings to judge by for which a trained network may give
# no finite embedding.
MOST_LOST = 0.02


@dataclasses.dataclass(frozen=True)
class Embedded:
    """Embeddings (N, D) of recordings, by their rows in the manifest (N,)."""

    rows: np.ndarray
    vectors: np.ndarray

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Returns the vectors of `rows`, without rows that were not read."""
        place = {row: number for number, row in enumerate(self.rows.tolist())}
        return self.vectors[[place[r] for r in rows.tolist() if r in place]]


class Ladder:
    """An encoder, unlabelled audio, and the rungs that were tried so far.

    A run folder keeps every step: after an interruption the same calls
    continue where it stopped. `encoder` is a source for `load_extractor`, and
    `audio` a folder of files, at any depth. `labels` is a csv of a few
    recordings' speakers, see `read_given`, for training; the verdict reads no
    labels. `channel` is the one to read, by default the mean of all. `train`
    says whether `try_training` follows, so that progress counts its steps.
    The audio is listed at once, and embedded by `try_backends`.

    Raises FileNotFoundError or ValueError if a folder is missing, the encoder
    cannot be loaded, there is too little audio, the labels do not fit, or the
    folder was begun with another encoder or has rungs of other audio. Raises
    FileExistsError if the folder has recordings, or files that `lgl adapt` did
    not write and would replace.
    """

    def __init__(
        self,
        encoder: str | pathlib.Path,
        audio: str | pathlib.Path,
        folder: str | pathlib.Path,
        device: str | None = None,
        num_workers: int | None = None,
        labels: str | pathlib.Path | None = None,
        channel: int | None = None,
        train: bool = False,
    ):
        self.source, self.audio = pathlib.Path(encoder), pathlib.Path(audio)
        self.device = check_device(device)
        # The encoder first: its faults show before a long scan.
        self.extract = load_extractor(encoder, self.device, num_workers)
        self.settings = encoder_settings(encoder) or {}
        self.folder = pathlib.Path(folder)
        listed = self.folder / "manifest.csv"
        begins = not (self.folder / STATE).exists()
        if begins:  # a lock proves nothing here: `lgl embed` leaves one, too
            refuse_recordings(self.folder, audio)
            refuse_foreign(self.folder, MADE)
        lock_folder(self.folder)
        files = encoder_files(encoder)
        made_from = {name: checksum(path) for name, path in files.items()}
        if begins:  # otherwise an interrupted listing would look foreign
            Run(self.folder, 0, {"made_from": made_from}).save()
        self._check_begun(made_from, f"another encoder than {encoder}")
        other = f"other audio than {audio} has now"
        channels = other_channel(self.folder, channel)
        judged = {*read_state(self.folder)["done"]} - {START}

        def accept(version):
            if not judged:  # for lack of audio, perhaps, which was now added
                return
            times = {"times": version["times"]}
            files = {listed.name: version[listed.name]}
            self._check_begun(files, channels or other)
            self._check_begun(times, f"{other}, by the files' times")

        rate = self.extract.sample_rate
        self.manifest, version = list_folder(
            audio, listed, rate, accept, channel
        )
        accept(version)  # a file may have been written since it was listed
        self.times = version["times"]
        # Steps of an earlier version, with another rule, are done again.
        made_from.update(version, judged=f"{JUDGED} by rule {RULE}")
        number, self.given, n_known = len(self.manifest), None, 0
        self.training = self.folder / "training"
        if labels is not None:
            self.given = read_given(labels, self.manifest.ids)
            n_known = len(self.given.rows)
            # A folder for each file of labels: a training cannot continue with
            # other labels.
            self.training = self.folder / f"training-{checksum(labels)[:8]}"
        self.run = Run(self.folder, 0, {"made_from": made_from})
        self.run.plan = steps_of(train)
        record_start(self.folder, 0, self.device)
        usable = f"{audio} has {number} recordings that can be used"
        check_enough(number, usable)
        if train:
            half = f". --train takes {2 * FEWEST}: half of them judge it"
            check_enough(number // 2, usable, half)
        free = number - n_known
        check_enough(free, f"{labels} leaves {free} recordings without a label")
        self.order = np.random.default_rng(0).permutation(number)
        self.rungs: list[Rung] = []
        self.backend: Backend | None = None
        self.kind = ""
        self.backend_checksum = ""

    @property
    def kept(self) -> bool:
        """Says whether any rung is kept."""
        return any(rung.kept for rung in self.rungs)

    def _check_begun(self, files, otherwise):
        """Refuses a folder that was begun with other files, and names them.

        The training would refuse them, too, but only after the other rungs.
        """
        state = read_state(self.folder)
        begun = state["settings"].get(ADAPTATION)
        if begun is None:
            raise ValueError(
                f"{self.folder} holds a training, which is no folder of `lgl "
                "adapt`: set another --output_folder"
            )
        if not state["sources"]:  # no step is begun
            return
        before = begun["made_from"]
        differ = [name for name in files if files[name] != before.get(name)]
        if differ:
            raise ValueError(
                f"{self.folder} was begun with {otherwise} (of which these "
                f"differ: {', '.join(differ)}). Nothing was changed. Bring "
                "that back, or set another --output_folder."
            )

    def _start(self):
        """Embeds with the encoder as it was given."""

        def embed(folder):
            save_weights(self.extract.encoder.network, folder / ENCODER)
            # An encoder that cannot be exported is refused before the work.
            InferenceModel(self.settings, folder / ENCODER)
            self._read(self.extract, self.order[:FITTED], folder)

        self.made_from = self.run.identity()
        self._step(START, embed)
        self._take(START)
        with self._on_record(next(iter(BACKENDS))):
            self._judge_by(self.order[:JUDGED])

    @contextlib.contextmanager
    def _on_record(self, name):
        """Records why a step failed, for `lgl status`."""
        try:
            yield
        except ValueError as error:
            self.run.failed[name] = str(error)
            self.run.save()
            raise

    def _step(self, name, work):
        """Does a step, unless it is done; its source is the step before."""
        with stop.on_signals():
            result = self.run.step(name, work, self.made_from)
        self.made_from = self.run.checksum(name)
        return result

    def _embedded(self, *stores):
        """Returns the embeddings of stores, by rows."""
        return Embedded(
            np.concatenate([self.manifest.rows(s.utterances) for s in stores]),
            np.concatenate([s.vectors for s in stores]),
        )

    def _read(self, extract, rows, folder):
        """Embeds recordings into a folder; logs bad ones in bad_files.txt."""
        store, bad = extract(self.manifest, rows, folder, version=self.times)
        BadFiles(self.folder / "bad_files.txt", limit=sys.maxsize).add(bad)
        return store

    def _take(self, name):
        """Uses the weights and embeddings of a step from now on."""
        self.weights = self.folder / name / ENCODER
        self.embedded = self._embedded(Embeddings.load(self.folder / name))

    def _judge_by(self, judged):
        """Uses the rows `judged` for verdicts from now on."""
        self.judged = judged[np.isin(judged, self.embedded.rows)]
        check_enough(
            len(self.judged),
            f"{len(self.judged)} of {len(judged)} recordings to judge by can "
            "be read",
            f". bad_files.txt in {self.folder} names the others.",
        )
        bare = self.embedded.of(self.judged)
        self.n_speakers = count_speakers(bare)
        self.best = self.backend(bare) if self.backend else bare

    def _done(self, name, result):
        """Adds a rung that is done to the list; tells whether it is kept."""
        rung = Rung(name, Verdict(**result))
        self.rungs.append(rung)
        logger.info("%s: %s", name, rung.verdict)
        return rung.kept

    def _judge(self, embedded, kind, folder):
        """Fits a back-end, or none, and judges against the best so far."""
        is_embedded = np.isin(self.judged, embedded.rows)
        lost, number = np.count_nonzero(~is_embedded), len(is_embedded)
        if lost > MOST_LOST * number:
            raise ValueError(
                f"{lost} of {number} recordings to judge by have no finite "
                "embedding by the trained network. Lower --lr."
            )
        transformed = bare = embedded.of(self.judged)
        if kind:
            backend = BACKENDS[kind]().fit(embedded.of(self.order[:FITTED]))
            backend.save(folder / BACKEND)
            transformed = backend(bare)
        verdict = judge(self.best[is_embedded], transformed, self.n_speakers)
        tie = verdict.low <= 0 <= verdict.high
        if embedded is self.embedded and self.kind and tie:
            # If two back-ends tie, the later one is judged against the bare
            # embeddings: on labelled trials it was mostly the better one
            # (docs/adapt_measured.md).
            verdict = judge(bare, transformed, self.n_speakers)
        return dataclasses.asdict(verdict)

    def _climb(self, name, kind):
        """Makes a rung that is kept the best so far."""
        self.kind, self.best = kind, self.embedded.of(self.judged)
        if kind:
            path = self.folder / name / BACKEND
            self.backend = load_backend(path)
            self.backend_checksum = checksum(path)
            self.best = self.backend(self.best)

    def try_backends(self) -> None:
        """Embeds the audio, and tries the rungs that do not train.

        Raises ValueError if the recordings do not allow a verdict.
        """
        self._start()
        for name in BACKENDS:
            fit = functools.partial(self._judge, self.embedded, name)
            with self._on_record(name):
                verdict = self._step(name, fit)
            if self._done(name, verdict):
                self._climb(name, name)

    def _split(self):
        """Keeps speakers out of training, and uses them for verdicts."""

        def work(folder):
            rest = self.order[FITTED:]
            if len(rest):
                self._read(self.extract, rest, folder)
            embedded = every()
            labelled = np.zeros(len(embedded.rows), bool)
            if self.given is not None:
                labelled = self.given.of(embedded.rows) >= 0
            drawn = kept_out(embedded.vectors, labelled, device=self.device)
            out = embedded.rows[drawn]
            check_enough(
                len(out),
                f"{len(out)} recordings are of speakers to judge training by",
                ": their clusters must have no label and hold less than half "
                "of the recordings. Give labels of fewer speakers, or leave "
                "--train out.",
            )
            # Without unreadable files: training stops if they are above 2 %.
            rest = np.setdiff1d(embedded.rows, out)
            save_arrays(folder / ROWS, kept_out=out, trained=rest)
            return {"kept_out": len(out)}

        def every():
            stores = [Embeddings.load(self.folder / START)]
            if len(self.order) > FITTED:
                stores.append(Embeddings.load(self.folder / SPLIT))
            return self._embedded(*stores)

        if self.given is not None:  # the step depends on the labels
            rows = self.given.rows.tolist()
            self.made_from = digest([self.made_from, rows])
        with self._on_record(SPLIT):
            self._step(SPLIT, work)
        self.embedded = every()
        rows = load_arrays(self.folder / SPLIT / ROWS)
        judged = np.random.default_rng(0).permutation(rows["kept_out"])
        with self._on_record(TRAINED):
            self._judge_by(judged[:JUDGED])
        self.trained = rows["trained"]

    def try_training(
        self,
        train: Callable[[Ladder], pathlib.Path],
        settings: Sequence[str] = (),
    ) -> None:
        """Tries the rung that trains the whole network.

        `train` takes the ladder, trains from `weights` on the rows `trained`
        in the folder `training`, and returns the path of the new weights.
        `settings` describes the settings of `train` that differ from the
        preset. Other settings or other labels get a training and a verdict of
        their own. Raises ValueError if too few speakers are left to judge by.
        """
        before = self.judged, self.embedded, self.best, self.n_speakers
        self._split()
        if settings:
            made_by = digest([*settings])[:8]
            self.training = self.folder / f"{self.training.name}-{made_by}"
        # The split depends only on which recordings have labels, not on the
        # speakers' names: after a correction the old training would stay. The
        # folder's name depends on labels and settings.
        self.made_from = digest([self.made_from, self.training.name])

        def work(folder):
            extract = copy.copy(self.extract)
            extract.encoder = copy.deepcopy(self.extract.encoder)
            load_weights(extract.encoder.network, train(self))
            save_weights(extract.encoder.network, folder / ENCODER)
            wanted = np.union1d(self.judged, self.order[:FITTED])
            embedded = self._embedded(self._read(extract, wanted, folder))
            return self._judge(embedded, self.kind, folder)

        if self._done(TRAINED, self._step(TRAINED, work)):
            self._take(TRAINED)
            self._climb(TRAINED, self.kind)
        else:
            self.judged, self.embedded, self.best, self.n_speakers = before

    def export(
        self,
        folder: str | pathlib.Path,
        labelled: bool = False,
        licence: str = "other",
    ) -> float | None:
        """Writes what was kept as a folder that SpeechBrain alone loads.

        For the model card, `labelled` says whether the given encoder was
        trained with labels, and `licence` is that of the weights, as Hugging
        Face names it. Returns the decision threshold, found without labels, or
        None.
        """
        model = InferenceModel(
            self.settings, self.weights, backend=self.backend
        )

        def find():
            extract = model.extractor(self.device)
            extract.num_workers = self.extract.num_workers
            halved = self.manifest.take(self.judged[:HALVED])
            return threshold_by_halves(extract, halved, 0.5, 0)

        # Keyed by content: a rung that is done again may be fitted to files
        # that could not be read before, or by another version of this package.
        made_from = {
            "run": self.run.identity(),
            "weights": checksum(self.weights),
            "backend": self.backend_checksum,
            "judged": digest(self.judged.tolist()),
        }
        threshold = kept_threshold(self.folder / THRESHOLD, made_from, find)
        facts = {
            "encoder": model.encoder_class,
            "package": model.package,
            "rate": model.settings["sample_rate"],
            "threshold": threshold,
            "labelled": labelled,
            "trained": any(r.kept and r.name == TRAINED for r in self.rungs),
            "recordings": len(self.manifest),
            "hours": float(self.manifest.durations.sum()) / 3600,
            "judged": len(self.judged),
            "given": self.given,
        }
        rungs = HEADER, [rung.cells() for rung in self.rungs]
        names = str(self.source.absolute()), str(self.audio.absolute())
        card = adapted_card(facts, rungs, *names, licence)
        model.save(folder, card, threshold)
        return threshold

    def list_trained(self, path: pathlib.Path, labels: pathlib.Path) -> None:
        """Writes the manifest of the recordings to train on to `path`.

        If the user gave labels, writes those of these recordings to `labels`.
        """
        write_part(self.folder / "manifest.csv", path, self.trained)
        if self.given is None:
            return
        rows = self.trained[self.given.by_row[self.trained] >= 0]
        speakers = (self.given.speakers[n] for n in self.given.by_row[rows])
        named = zip((self.manifest.ids[row] for row in rows), speakers)
        write_csv(labels, itertools.chain([COLUMNS], named))
