"""Scores an encoder on a trial list: scores, error rates, DET curve.

Scores are cosines or, with the audio of a cohort, AS-norm's; the first minute
of an utterance is embedded.
"""

from __future__ import annotations

import pathlib
import time

import numpy as np

from lgl_plugin.dataio.cohort import draw_cohort
from lgl_plugin.dataio.trials import Trials, read_trials, trial_audio
from lgl_plugin.evaluation.verification import (
    adaptive_s_norm,
    bootstrap_eer,
    cohort_statistics,
    cosine_scores,
    write_scores,
)
from lgl_plugin.inference.extractor import load_extractor
from lgl_plugin.metrics.error_rates import eer, min_dcf
from lgl_plugin.report.figures import det, save
from lgl_plugin.utils.device import check_device
from lgl_plugin.utils.files import write_json
from lgl_plugin.utils.tables import markdown_table


def verify_encoder(
    encoder: str | pathlib.Path,
    verification_file: str | pathlib.Path,
    trial_folder: str | pathlib.Path,
    output_folder: str | pathlib.Path,
    cohort: str | pathlib.Path | None = None,
    top: int = 300,
    cohort_utterances: int = 20000,
    seed: int = 0,
    device: str | None = None,
    num_workers: int = 0,
) -> dict:
    """Scores a trial list and writes scores, error rates and DET curves.

    Arguments
    ---------
    encoder : str or os.PathLike
        The exported folder.
    verification_file : str or os.PathLike
        The trial list, see `trials.read_trials`.
    trial_folder : str or os.PathLike
        The folder that the list's paths start from.
    output_folder : str or os.PathLike
        Where to write; files of an earlier run are replaced.
    cohort : str or os.PathLike, optional
        A folder of unlabelled audio. With it, scores are normalised by
        AS-norm; `scores.txt` then holds these.
    top : int
        AS-norm takes this many of the highest scores against the cohort.
    cohort_utterances : int
        How many files of the cohort are drawn.
    seed : int
        Seed of that draw and of the confidence interval's.
    device : str, optional
        Where to embed; the GPU if there is one.
    num_workers : int
        Processes that read audio; 0 reads in this one.

    Returns
    -------
    dict
        What `metrics.json` holds: under "scores", of the cosine and with a
        cohort of AS-norm, what `error_rates` returns; counts; the options.

    Raises
    ------
    FileNotFoundError
        If a folder, the list or audio that it names is missing.
    ValueError
        If the encoder cannot be loaded, the list is malformed, one of its
        utterances cannot be embedded or the cohort is too small.
    lgl_plugin.dataio.audio.BadAudio
        If nothing can be embedded.

    Example
    -------
    >>> import torch
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "hyperparams.yaml").write_text('''
    ... modules:
    ...     compute_features: !new:speechbrain.lobes.features.Fbank
    ...     mean_var_norm: null
    ...     embedding_model: !new:lgl_plugin.nnet.encoders.LogMelStatistics
    ... ''')
    >>> torch.save({}, folder / "embedding_model.ckpt")
    >>> import soundfile
    >>> rng = np.random.default_rng(0)
    >>> for name in ("a1", "a2", "b1", "b2"):
    ...     noise = rng.normal(scale=0.1 if "a" in name else 1e-3, size=8000)
    ...     soundfile.write(folder / f"{name}.wav", noise, 16000)
    >>> trials = "1 a1.wav a2.wav\\n0 a1.wav b1.wav\\n1 b1.wav b2.wav\\n"
    >>> _ = (folder / "trials.txt").write_text(trials)
    >>> found = verify_encoder(
    ...     folder, folder / "trials.txt", folder, folder / "out", device="cpu"
    ... )
    4 utterances embedded, ... a second
    >>> found["scores"]["cosine"]["eer"], found["trials"], found["targets"]
    (0.0, 3, 2)
    >>> sorted(path.name for path in (folder / "out").iterdir())
    ['det.png', 'det.svg', 'metrics.json', 'scores.txt']
    """
    # First of all, while the arguments are the only local variables.
    options = {
        name: str(value) if isinstance(value, pathlib.Path) else value
        for name, value in locals().items()
    }
    # All that can be wrong is checked before the encoder runs for hours.
    extract = load_extractor(encoder, check_device(device), num_workers)
    trials = read_trials(verification_file, trial_folder)
    audio = trial_audio(trials, trial_folder)
    if cohort is not None:
        speech = draw_cohort(
            cohort, verification_file, trial_folder, cohort_utterances, seed
        )
        if not 2 <= top <= len(speech):
            raise ValueError(
                f"--top={top} must be from 2 to the number of files drawn from "
                f"{cohort}, which is {len(speech)} of --cohort_utterances="
                f"{cohort_utterances}: give more audio or a smaller --top"
            )
    output = pathlib.Path(output_folder)
    output.mkdir(parents=True, exist_ok=True)

    started = time.perf_counter()
    embeddings, bad = extract(audio, np.arange(len(audio)))
    if bad:
        raise ValueError(
            f"{len(bad)} utterances of {verification_file} cannot be scored; "
            f"the first: {' '.join(bad[0])}"
        )
    speed = len(audio) / (time.perf_counter() - started)
    print(f"{len(audio)} utterances embedded, {speed:.1f} a second")
    final = cosine_scores(embeddings.vectors, trials)
    scores = {"cosine": final}
    counts = {
        "trials": len(trials),
        "targets": int(trials.labels.sum()),
        "utterances": len(audio),
        "utterances_per_second": speed,
    }
    if cohort is not None:
        others, bad = extract(speech, np.arange(len(speech)))
        if bad:
            print(
                f"{len(bad)} files of the cohort cannot be embedded and are "
                f"left out; the first: {' '.join(bad[0])}"
            )
        statistics = cohort_statistics(embeddings.vectors, others.vectors, top)
        final = adaptive_s_norm(final, trials, *statistics)
        scores["AS-norm"] = final
        counts["cohort"] = len(others.vectors)

    write_scores(output / "scores.txt", trials, final)
    save(det({n: (s, trials.labels) for n, s in scores.items()}), output, "det")
    rates = {n: error_rates(s, trials, seed) for n, s in scores.items()}
    metrics = {"scores": rates, **counts, "options": options}
    write_json(output / "metrics.json", metrics)
    return metrics


def error_rates(scores: np.ndarray, trials: Trials, seed: int = 0) -> dict:
    """Computes the error rates of a system's scores.

    Arguments
    ---------
    scores : array-like, (T,), float
        One score per trial.
    trials : lgl_plugin.dataio.trials.Trials
        The trials that were scored.
    seed : int
        Seed of the interval's draws.

    Returns
    -------
    dict
        `eer` in percent; `eer_interval`, its 95 % confidence interval from a
        bootstrap over speakers, None where the list has a single one;
        `min_dcf_001` and `min_dcf_005`, for targets as frequent as 1 and 5 %;
        the `threshold` at the EER.

    Raises
    ------
    ValueError
        When a score is not finite.

    Example
    -------
    >>> from lgl_plugin.dataio.trials import Trials
    >>> sides = np.array([0, 1, 0, 0]), np.array([1, 2, 2, 3])
    >>> trials = Trials(np.array([True] * 3 + [False]), list("abcd"), *sides)
    >>> found = error_rates([0.9, 0.8, 0.7, 0.1], trials)
    >>> found["eer"], found["min_dcf_001"], round(found["threshold"], 3)
    (0.0, 0.0, 0.4)
    """
    rate, threshold = eer(scores, trials.labels)
    try:
        interval = bootstrap_eer(scores, trials, seed=seed)
        interval = [100 * end for end in interval]
    except ValueError:
        # eer validated the scores, so ValueError here means a single speaker.
        interval = None
    return {
        "eer": 100 * rate,
        "eer_interval": interval,
        "min_dcf_001": min_dcf(scores, trials.labels, p_target=0.01),
        "min_dcf_005": min_dcf(scores, trials.labels, p_target=0.05),
        "threshold": threshold,
    }


def table(metrics: dict) -> str:
    """Returns a Markdown table of the error rates from `verify_encoder`."""
    header = ["scores", "EER % (95 %)"]
    header += ["minDCF 0.01", "minDCF 0.05", "threshold"]
    rows = []
    for name, rates in metrics["scores"].items():
        rate = f"{rates['eer']:.2f}"
        if rates["eer_interval"]:
            rate += " ({:.2f}-{:.2f})".format(*rates["eer_interval"])
        others = ("min_dcf_001", "min_dcf_005", "threshold")
        rows.append([name, rate, *(f"{rates[key]:.3f}" for key in others)])
    return markdown_table(header, rows)
