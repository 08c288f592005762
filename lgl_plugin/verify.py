"""An encoder against a trial list: scores, error rates, DET curve.

> python -m lgl_plugin.verify results/lgl/1/export/iter5 veri_test2.txt \
    /path/to/VoxCeleb1/wav --output_folder=results/vox1_o
> python -m lgl_plugin.verify results/lgl/1/export/iter5 list_test_all2.txt \
    /path/to/VoxCeleb1/wav --output_folder=results/vox1_e \
    --cohort=/path/to/VoxCeleb2/wav

The encoder is a folder that `lgl_plugin.export` wrote, or another one with
SpeechBrain's `hyperparams.yaml` and `embedding_model.ckpt`. Scores are cosines
or, with the audio of a cohort, AS-norm's; of an utterance the first minute is
heard. The output folder gets `scores.txt`, `metrics.json`, `det.png` and
`det.svg`.
"""

import argparse
import collections
import os
import pathlib
import random
import time

import numpy as np
from hyperpyyaml import load_hyperpyyaml
from tqdm import tqdm

from lgl_plugin.artefacts import load_weights
from lgl_plugin.data import BadAudio, audio_seconds
from lgl_plugin.embeddings import Extractor
from lgl_plugin.figures import det, save
from lgl_plugin.files import write_json
from lgl_plugin.manifest import Manifest
from lgl_plugin.prepare import find_audio, trial_places, without_tested
from lgl_plugin.training import check_device, trial_audio
from lgl_plugin.verification import (
    adaptive_s_norm,
    bootstrap_eer,
    cohort_statistics,
    cosine_scores,
    eer,
    min_dcf,
    read_trials,
    write_scores,
)

PARTS = ("compute_features", "mean_var_norm", "embedding_model")


def verify_encoder(
    encoder,
    verification_file,
    trial_folder,
    output_folder,
    cohort=None,
    top=300,
    cohort_utterances=20000,
    seed=0,
    device=None,
    num_workers=0,
):
    """Scores a trial list and writes scores, error rates and DET curves.

    Arguments
    ---------
    encoder : str or pathlib.Path
        The exported folder.
    verification_file : str or pathlib.Path
        The trial list, see `verification.read_trials`.
    trial_folder : str or pathlib.Path
        The folder that the list's paths start from.
    output_folder : str or pathlib.Path
        Where to write; files of an earlier run are replaced.
    cohort : str or pathlib.Path, optional
        A folder of unlabelled audio. With it, scores are normalised by
        AS-norm; `scores.txt` then holds these.
    top : int
        Highest scores against the cohort that count.
    cohort_utterances : int
        How many files of the cohort are drawn.
    seed : int
        Of that draw and of the confidence interval's.
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
    lgl_plugin.data.BadAudio
        If nothing can be embedded.

    Example
    -------
    >>> import torch
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "hyperparams.yaml").write_text('''
    ... modules:
    ...     compute_features: !new:speechbrain.lobes.features.Fbank
    ...     mean_var_norm: null
    ...     embedding_model: !new:lgl_plugin.embeddings.LogMelStatistics
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
    options = {
        name: str(value) if isinstance(value, os.PathLike) else value
        for name, value in locals().items()
    }
    # What can be wrong without the encoder having run comes first.
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
    found, bad = extract(audio, np.arange(len(audio)))
    if bad:
        raise ValueError(
            f"{len(bad)} utterances of {verification_file} cannot be scored; "
            f"the first: {' '.join(bad[0])}"
        )
    speed = len(audio) / (time.perf_counter() - started)
    print(f"{len(audio)} utterances embedded, {speed:.1f} a second")
    final = cosine_scores(found.vectors, trials)
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
        statistics = cohort_statistics(found.vectors, others.vectors, top)
        final = adaptive_s_norm(final, trials, *statistics)
        scores["AS-norm"] = final
        counts["cohort"] = len(others.vectors)

    write_scores(output / "scores.txt", trials, final)
    curves = {name: (of, trials.labels) for name, of in scores.items()}
    save(det(curves), output, "det")
    rates = {name: error_rates(of, trials, seed) for name, of in scores.items()}
    metrics = {"scores": rates, **counts, "options": options}
    write_json(output / "metrics.json", metrics)
    return metrics


def load_extractor(folder, device="cpu", num_workers=0):
    """An Extractor around the encoder of a SpeechBrain inference folder.

    SpeechBrain's own loader lets weights pass that fit no module, with a
    warning, and the encoder then stays random; here all must fit. The folder
    is all that is read: the paths of the yaml's `pretrainer`, which may lead
    to the Hugging Face Hub, are not followed.

    Arguments
    ---------
    folder : str or pathlib.Path
        With `hyperparams.yaml`, whose `modules` name compute_features,
        mean_var_norm and embedding_model, and `embedding_model.ckpt`.
    device : str
        Where the encoder runs.
    num_workers : int
        Processes that read audio.

    Returns
    -------
    lgl_plugin.embeddings.Extractor

    Raises
    ------
    FileNotFoundError
        If the folder or one of the files is missing.
    ValueError
        If the yaml cannot be loaded or the weights do not fit it.

    Example
    -------
    >>> load_extractor("results/lgl/1")
    Traceback (most recent call last):
    FileNotFoundError: results/lgl/1 is no exported encoder: it holds no \
hyperparams.yaml. `python -m lgl_plugin.export RUN` writes one to RUN/export
    """
    folder = pathlib.Path(folder)
    for name in ("hyperparams.yaml", "embedding_model.ckpt"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} is no exported encoder: it holds no {name}. "
                "`python -m lgl_plugin.export RUN` writes one to RUN/export"
            )
    path = folder / "hyperparams.yaml"
    try:
        hparams = load_hyperpyyaml(path.read_text(encoding="utf-8"))
        features, normalise, model = (hparams["modules"][n] for n in PARTS)
    except Exception as error:  # whatever the classes that it names raise
        raise ValueError(
            f"{path} cannot be loaded, or its modules lack one of "
            f"{', '.join(PARTS)}: {error!r}"
        ) from error
    return Extractor(
        features,
        normalise,
        load_weights(model, folder / "embedding_model.ckpt"),
        device,
        hparams.get("sample_rate", 16000),
        num_workers=num_workers,
    )


def draw_cohort(folder, verification_file, trial_folder, size, seed=0):
    """A random sample of a folder's audio without the trial list's speakers.

    As in training, all below a first-level folder that holds an utterance of
    the trial list is left out; that is printed. Files whose header cannot be
    read are passed over.

    Arguments
    ---------
    folder : str or pathlib.Path
        Audio in wav, flac, ogg or mp3 files, at any depth.
    verification_file : str or pathlib.Path
        The trial list.
    trial_folder : str or pathlib.Path
        The folder that its paths start from.
    size : int
        How many files to draw; all, where there are fewer.
    seed : int
        Of the draw.

    Returns
    -------
    lgl_plugin.manifest.Manifest
        Sorted by path, which is the ID.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    ValueError
        If there is no audio in it, or none that the list does not test on.

    Example
    -------
    >>> import soundfile
    >>> folder = getfixture("tmp_path")
    >>> for name in ("ann", "bob", "cat", "dan"):
    ...     (folder / name).mkdir()
    ...     soundfile.write(folder / name / "1.wav", np.zeros(8000), 16000)
    >>> trials = folder / "trials.txt"
    >>> lines = "1 ann/1.wav ann/1.wav\\n0 ann/1.wav bob/1.wav\\n"
    >>> _ = trials.write_text(lines)
    >>> list(draw_cohort(folder, trials, folder, size=10).ids)
    2 files of the cohort, of 2 folders that the trial list tests on, are left \
out
    ['cat/1.wav', 'dan/1.wav']
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"--cohort: there is no folder {folder}")
    counts = collections.Counter()
    files = find_audio(folder, collections.Counter())
    places = trial_places(verification_file, trial_folder)
    files = without_tested(files, folder, places, counts)
    names = [name for name, problem in files if problem is None]
    if counts["excluded"]:
        print(
            f"{counts['excluded']} files of the cohort, of "
            f"{counts['excluded folders']} folders that the trial list tests "
            "on, are left out"
        )
    if not names:
        raise ValueError(
            f"--cohort: {folder} holds no wav, flac, ogg or mp3 file of a "
            "folder that the trial list does not test on. Give a folder with "
            "one folder for each of other speakers"
        )
    random.Random(seed).shuffle(names)
    rows = []
    with tqdm(total=min(size, len(names)), desc="cohort", delay=3) as progress:
        for name in names:
            if len(rows) == size:
                break
            path = str(folder / name)
            try:
                seconds = audio_seconds(path)
            except BadAudio:
                continue
            rows.append((name, path, 0.0, seconds, ""))
            progress.update()
    return Manifest.of(sorted(rows))


def error_rates(scores, trials, seed=0):
    """What is said of a system's scores.

    Arguments
    ---------
    scores : array-like, (T,), float
        One score per trial.
    trials : lgl_plugin.verification.Trials
        The trials that were scored.
    seed : int
        Of the interval's draws.

    Returns
    -------
    dict
        `eer` in percent; `eer_interval`, that of 95 % by drawing speakers,
        None where the list has a single one; `min_dcf_001` and `min_dcf_005`;
        the `threshold` at the EER.

    Raises
    ------
    ValueError
        When a score is not finite.

    Example
    -------
    >>> from lgl_plugin.verification import Trials
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
    except ValueError:  # of all that it refuses, one speaker is what is left
        interval = None
    return {
        "eer": 100 * rate,
        "eer_interval": interval,
        "min_dcf_001": min_dcf(scores, trials.labels, p_target=0.01),
        "min_dcf_005": min_dcf(scores, trials.labels, p_target=0.05),
        "threshold": threshold,
    }


def table(metrics):
    """A Markdown table of the error rates.

    Arguments
    ---------
    metrics : dict
        From `verify_encoder`.

    Returns
    -------
    str

    Example
    -------
    >>> rates = {"eer": 2.5, "eer_interval": [1.75, 3.0], "threshold": 0.3}
    >>> rates |= {"min_dcf_001": 0.25, "min_dcf_005": 0.125}
    >>> print(table({"scores": {"cosine": rates}}))
    | scores | EER % (95 %) | minDCF 0.01 | minDCF 0.05 | threshold |
    | --- | --- | --- | --- | --- |
    | cosine | 2.50 (1.75-3.00) | 0.250 | 0.125 | 0.300 |
    """
    lines = [
        "| scores | EER % (95 %) | minDCF 0.01 | minDCF 0.05 | threshold |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, rates in metrics["scores"].items():
        rate = f"{rates['eer']:.2f}"
        if rates["eer_interval"]:
            rate += " ({:.2f}-{:.2f})".format(*rates["eer_interval"])
        others = ("min_dcf_001", "min_dcf_005", "threshold")
        cells = [name, rate, *(f"{rates[other]:.3f}" for other in others)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments=None):
    """Scores a trial list from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("encoder", help="exported folder")
    parser.add_argument(
        "verification_file", help="trial list, lines of label path path"
    )
    parser.add_argument("trial_folder", help="where the list's paths begin")
    parser.add_argument(
        "--output_folder", required=True, help="folder of the results"
    )
    parser.add_argument(
        "--cohort", help="folder of unlabelled audio; with it, AS-norm"
    )
    parser.add_argument(
        "--top", type=int, default=300, help="nearest of the cohort that count"
    )
    parser.add_argument(
        "--cohort_utterances",
        type=int,
        default=20000,
        help="how many files of the cohort are drawn",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="none: the GPU if there is one")
    parser.add_argument(
        "--num_workers", type=int, default=0, help="processes that read audio"
    )
    options = parser.parse_args(arguments)
    try:
        metrics = verify_encoder(**vars(options))
    except (BadAudio, OSError, ValueError) as error:
        parser.error(str(error))
    nontargets = metrics["trials"] - metrics["targets"]
    print(
        f"\n{metrics['targets']:,} target and {nontargets:,} non-target trials"
        f"\n\n{table(metrics)}\n\nIn {options.output_folder}: scores.txt, "
        "metrics.json, det.png, det.svg"
    )


if __name__ == "__main__":
    main()
