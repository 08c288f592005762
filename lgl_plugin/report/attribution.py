"""Writes the page of `lgl attribute`: what bands, moments and layers add.

A trial's score is the cosine of both recordings' embeddings. The score is
attributed to the second recording, see `lgl_plugin.inference.attribution`.
"""

import json
import math
import pathlib
from collections.abc import Iterator

import numpy as np

from lgl_plugin.dataio.audio import BadAudio, channel_of, probe, read_beginning
from lgl_plugin.dataio.folder import refuse_recordings
from lgl_plugin.dataio.trials import read_trials
from lgl_plugin.inference.attribution import PATHS, Explainer
from lgl_plugin.inference.extractor import MAX_SECONDS, load_extractor
from lgl_plugin.report import inside_figures
from lgl_plugin.report.attribution_numbers import (
    HEADER,
    KINDS,
    MOMENTS,
    Numbers,
    Trial,
)
from lgl_plugin.report.page import Block, Figure, Page, Table
from lgl_plugin.utils.device import check_device
from lgl_plugin.utils.files import check_writable
from lgl_plugin.utils.progress import tqdm

MAX_LEFT_OUT = 0.1  # the share of trials for which the steps may not suffice
EXAMPLES = 2  # trials of each kind that are drawn as a heat map


def attribute(
    encoder: str | pathlib.Path,
    trials: str | pathlib.Path,
    audio: str | pathlib.Path,
    output_folder: str | pathlib.Path,
    number: int = 100,
    steps: int = 512,
    over: tuple[str, ...] = PATHS,
    seed: int = 0,
    channel: int | None = None,
    device: str | None = None,
) -> dict:
    """Attributes scores of trials to bands, moments and layers.

    The options are those of `lgl attribute`. The output folder gets
    `index.html` with its figures, `trials.csv`, for each kind of path
    `bands_<path>.csv` and `time_<path>.csv`, and `attribution.json`. The
    content of the last is returned: the options; the mean `score` of each kind
    of trials; what ranges of frequency and layers have `added` to the score, by
    path, with standard errors; the trials `left_out`, with the reason.

    Raises ValueError if a recording cannot be embedded, or the steps do not
    suffice for more than a tenth of the trials.
    """
    # Must come first, while the arguments are the only local variables.
    options = json.loads(json.dumps(locals(), default=str))
    if number < 4:
        raise ValueError(
            f"--number={number}: it must be 4 or more, two targets and two "
            "non-targets"
        )
    output = pathlib.Path(output_folder)
    refuse_recordings(output, audio)
    check_writable(output)  # before the long work
    extract = load_extractor(encoder, check_device(device))
    listed = read_trials(trials, audio)
    network = extract.encoder.to(extract.device)
    rate, folder = extract.sample_rate, pathlib.Path(audio)
    explain = Explainer(network, rate, steps, seed, tuple(over))
    rows = draw(listed.labels, number, seed)
    targets = int(listed.labels[rows].sum())
    if min(targets, len(rows) - targets) < 2:  # a standard error needs two
        raise ValueError(
            f"--number={number} draws {targets} targets and "
            f"{len(rows) - targets} non-targets of {trials}: two of each are "
            "needed, or more"
        )
    shortest = getattr(network, "min_samples", 1)
    drawn = [
        [listed.utterances[s[row]] for s in (listed.enrolment, listed.test)]
        for row in rows
    ]
    names = {name for pair in drawn for name in pair}
    for name in tqdm(sorted(names), "recordings", unit="recording"):
        # All are read first: a bad recording at the end would cost hours.
        _read(folder / name, rate, shortest, channel)
    done, left_out = [], {}
    bar = tqdm(rows, "trials", unit="trial")
    for row, names in zip(bar, drawn):
        wavs = [
            _read(folder / name, rate, shortest, channel).to(extract.device)
            for name in names
        ]
        try:
            explanation = explain(*wavs)
        except ValueError as error:
            left_out[" ".join(names)] = str(error)
            if len(left_out) > MAX_LEFT_OUT * len(rows):
                raise ValueError(
                    f"{len(left_out)} of {len(rows)} trials, the last "
                    f"{' '.join(names)}: {error}"
                ) from error
            bar.write(f"{' '.join(names)} is left out: {error}")
            continue
        kind = KINDS[not listed.labels[row]]
        is_example = [trial.kind for trial in done].count(kind) < EXAMPLES
        trial = Trial(kind, *names, explanation, is_example)
        done.append(trial)
        errors = ", ".join(
            f"{name} {path.error:.1%} off with {path.steps} steps"
            for name, path in explanation.paths.items()
        )
        bar.write(
            f"{kind} {' '.join(names)}: score {explanation.score:.3f}, {errors}"
        )
    numbers = Numbers(done, options, left_out)
    numbers.write(output)
    _write_page(output, numbers)
    return numbers.facts


def draw(labels: np.ndarray, number: int, seed: int) -> np.ndarray:
    """Draws rows of a list, as many targets as non-targets if possible."""
    rng = np.random.default_rng(seed)
    halves = []
    for kind, size in ((labels, (number + 1) // 2), (~labels, number // 2)):
        rows = np.flatnonzero(kind)
        size = min(size, len(rows))
        halves.append(np.sort(rng.choice(rows, size, replace=False)))
    return np.concatenate(halves)


def _read(path, rate, shortest, channel):
    """Reads the part of a recording that an encoder embeds."""
    try:
        read = channel_of(probe(path, rate), channel)
        wav = read_beginning(
            path, 0.0, math.inf, MAX_SECONDS, rate, channel=read
        )
    except BadAudio as error:
        raise ValueError(f"{path} {error}") from error
    if len(wav) < shortest:
        raise ValueError(f"{path} has {len(wav)} samples, too few to embed")
    return wav


def rows_of(added: dict) -> list[list[str]]:
    """Returns the table's rows of what parts add, with standard errors."""
    rows = []
    for path, parts in added.items():
        for part, kinds in parts.items():
            (one, one_error), (other, other_error) = map(kinds.get, KINDS)
            error = (one_error**2 + other_error**2) ** 0.5
            pairs = (one, one_error), (other, other_error), (one - other, error)
            cells = [f"{value:+.3f} ± {error:.3f}" for value, error in pairs]
            rows.append([part, path, *cells])
    return rows


def _write_page(folder, numbers):
    """Writes the page of trials."""
    encoder = pathlib.Path(numbers.facts["options"]["encoder"])
    page = Page(folder, f"{encoder.name}, attributed")
    introduction = page.collect(_introduction, numbers.facts)
    sections = {
        "Which bands": page.collect(_bands, numbers),
        "Which layers": page.collect(_layers, numbers.layers),
        "When": page.collect(_time, numbers.by_path),
        "Examples": page.collect(_examples, numbers.trials),
        "Completeness": page.collect(_completeness, numbers),
        "How to read this": page.collect(_reading),
    }
    page.write(introduction, sections, "lgl attribute")


def _introduction(facts) -> Iterator[Block]:
    """Yields the facts."""
    options = facts["options"]
    yield {
        "encoder": options["encoder"],
        "trials": f"{facts['trials']}, of which {facts['targets']} targets",
        "mean score": ", ".join(
            f"{kind} {score:.2f}" for kind, score in facts["score"].items()
        ),
        "largest error": f"{facts['largest_error']:.1%} of the change",
    }


def _bands(numbers) -> Iterator[Block]:
    """Yields attributions by band, over features and waveform."""
    for each in numbers.by_path:
        yield Figure(
            f"bands_{each.name}",
            inside_figures.profile(
                each.hz,
                each.bands,
                "Hz, centre of the band",
                "added to the score, per band",
                hz=True,
            ),
            f"What each band of the {each.name} adds to the score, for target "
            f"and non-target trials; the numbers are in bands_{each.name}.csv.",
            f"Over the {each.name}: mean over the trials, with one standard "
            "error; all bands sum to the change of the score.",
        )
    yield Table(
        "What ranges of frequency and layers add to the score: mean over the "
        "trials and its standard error",
        HEADER,
        rows_of(numbers.facts["added"]),
    )


def _layers(layers) -> Iterator[Block]:
    """Yields the shares of layers, if the network joins any."""
    means = {kind: mean for kind, (mean, _) in layers.items()}
    if not means[KINDS[0]].size:
        return
    yield Figure(
        "layers",
        inside_figures.bars(means, "added to the score"),
        "What the output of each layer adds to the score; the numbers are in "
        "the table above.",
        "Outputs of the layers that the network joins, such as the blocks of "
        "ECAPA-TDNN, from the first to the last; mean over the trials.",
    )


def _time(sums) -> Iterator[Block]:
    """Yields attributions by the part of a recording's time."""
    share = 100 * (np.arange(MOMENTS) + 0.5) / MOMENTS
    for each in sums:
        yield Figure(
            f"time_{each.name}",
            inside_figures.profile(
                share, each.time, "% of the recording", "added to the score"
            ),
            "What each twentieth of a recording adds to the score; the numbers "
            f"are in time_{each.name}.csv.",
            f"Over the {each.name}, by twentieths of the recordings' time.",
        )


def _examples(trials) -> Iterator[Block]:
    """Yields heat maps of a few trials."""
    shown = [trial for trial in trials if trial.drawn is not None]
    for number, trial in enumerate(shown, 1):
        yield Figure(
            f"example_{number}",
            inside_figures.heatmap(trial.drawn),
            f"Log spectrogram of {trial.test}, and what each point of it adds "
            "to the score.",
            f"{trial.kind}: {trial.test} against "
            f"{trial.enrolment}, score {trial.score:.2f}. Orange raises "
            "the score, violet lowers it.",
            raster=True,
        )


def _completeness(numbers) -> Iterator[Block]:
    """Yields the table of trials."""
    yield (
        "Attributions are to sum to the score less that of the baseline. How "
        "far they are off, as a share of that change or of 0.1 where it is "
        "smaller, and after how many steps:"
    )
    yield Table("All trials", numbers.header, numbers.rows, folded=True)
    if left_out := numbers.facts["left_out"]:
        yield "The steps did not suffice for these trials, which are left out:"
        yield [f"{names}: {why}" for names, why in left_out.items()]


def _reading() -> Iterator[Block]:
    """Yields how to read the figures."""
    yield [
        "The path over the features starts from their means over time, alike "
        "in all frames; that over the waveform from noise of the recording's "
        "long-term spectrum. What both keep, the mean spectrum, is explained "
        "by neither.",
        "The path over the layers starts from what the layers put out at "
        "the first of these.",
        "A band that adds nothing may still be one that other bands make "
        "superfluous: the figures show what this encoder uses, not all that a "
        "band tells about the speaker.",
        "A band tells speakers apart where it raises the scores of targets "
        "more than those of non-targets.",
        "Standard errors take trials for independent, and they share "
        "speakers: the true ones are larger.",
    ]
