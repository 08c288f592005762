"""`lgl compare`: tells whether two recordings are of one speaker.

> lgl compare results/lgl/1/export/iter5 one.wav other.wav
"""

import argparse

from lgl_plugin.cli.common import (
    ENCODER_HELP,
    LONE_CHANNEL,
    add_channel,
    cosine,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    add = parser.add_argument
    add("encoder", help=ENCODER_HELP)
    add("first", help="an audio file")
    add("second", help="another")
    add(
        "--threshold",
        type=cosine,
        help="cosine from which on two are one speaker; none: the encoder's",
    )
    add_channel(parser, LONE_CHANNEL)
    add("--device", default="cpu", help="where to embed")


def run(
    encoder: str,
    first: str,
    second: str,
    threshold: float | None,
    channel: int | None,
    device: str,
) -> None:
    """Prints the cosine, the threshold and the verdict."""
    from lgl_plugin.clustering.vectors import normalised
    from lgl_plugin.dataio.audio import whole_file
    from lgl_plugin.dataio.manifest import Manifest
    from lgl_plugin.dataio.prepare import MIN_SECONDS
    from lgl_plugin.inference.extractor import load_extractor
    from lgl_plugin.inference.folder import read_threshold
    from lgl_plugin.utils.device import check_device

    extract = load_extractor(encoder, check_device(device))
    if threshold is None:
        threshold = read_threshold(encoder)
    rows, rates = [], (extract.sample_rate,)
    for file in first, second:
        try:
            rows.append(whole_file(file, file, channel, rates))
            seconds = rows[-1][3]
            if seconds < MIN_SECONDS:
                wrong = f"lasts {seconds:.3f} s, under {MIN_SECONDS} s"
                raise ValueError(wrong)
        except ValueError as error:
            raise ValueError(f"{file} {error}") from error
    one, other = normalised(extract.embed_all(Manifest.of(rows)))
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
