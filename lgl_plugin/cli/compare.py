"""`lgl compare`: tells whether two recordings are of one speaker.

> lgl compare results/lgl/1/export/iter5 one.wav other.wav
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    parser.add_argument(
        "encoder",
        help="exported folder, another of SpeechBrain's, or CAM++'s weights",
    )
    parser.add_argument("first", help="an audio file")
    parser.add_argument("second", help="another")
    parser.add_argument(
        "--threshold",
        type=float,
        help="cosine from which on two are one speaker; none: the encoder's",
    )
    parser.add_argument("--device", default="cpu", help="where to embed")


def run(
    encoder: str,
    first: str,
    second: str,
    threshold: float | None,
    device: str | None,
) -> None:
    """Prints the cosine, the threshold and the verdict."""
    import numpy as np

    from lgl_plugin.clustering.vectors import normalised
    from lgl_plugin.dataio.audio import probe
    from lgl_plugin.dataio.manifest import Manifest
    from lgl_plugin.inference.extractor import load_extractor
    from lgl_plugin.inference.folder import read_threshold
    from lgl_plugin.utils.device import check_device

    extract = load_extractor(encoder, check_device(device))
    if threshold is None:
        threshold = read_threshold(encoder)
    files = first, second
    rows = []
    for side, file in enumerate(files):
        try:
            rows.append((str(side), file, 0.0, probe(file).seconds, ""))
        except ValueError as error:
            raise ValueError(f"{file} {error}") from error
    found, bad = extract(Manifest.of(rows), np.arange(2))
    for side, reason in bad:
        raise ValueError(f"{files[int(side)]} {reason}")
    one, other = normalised(found.vectors)
    cosine = float(one @ other)
    print(f"cosine     {cosine:.3f}")
    if threshold is None:
        print(
            "threshold  none: the encoder's folder names none, so say yours "
            "by --threshold"
        )
        return
    print(f"threshold  {threshold:.3f}")
    kind = "one speaker" if cosine >= threshold else "two speakers"
    print(f"verdict    {kind}")
