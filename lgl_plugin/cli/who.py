"""`lgl who`: sorts the files of a folder by who speaks in them.

> lgl who results/lgl/1/export/iter5 /my/audio speakers
"""

from __future__ import annotations

import argparse

from lgl_plugin.cli.embed import add_machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    parser.add_argument(
        "encoder",
        help="exported folder, another of SpeechBrain's, or CAM++'s weights",
    )
    parser.add_argument(
        "audio", help="folder of audio files, each of one speaker"
    )
    parser.add_argument("output", help="folder of the results")
    parser.add_argument(
        "--threshold",
        type=float,
        help="average cosine from which on two groups are one speaker; none: "
        "the encoder's",
    )
    parser.add_argument(
        "--speakers", type=int, help="their number, if it is known"
    )
    add_machine(parser)


def run(
    encoder: str,
    audio: str,
    output: str,
    threshold: float | None,
    speakers: int | None,
    device: str | None,
    num_workers: int,
) -> None:
    """Writes speakers.csv and a page that plays each speaker's files."""
    import pathlib

    from lgl_plugin.cli.notices import show_notices
    from lgl_plugin.inference.folder import embed_folder
    from lgl_plugin.inference.speakers import find_speakers, write_speakers
    from lgl_plugin.report.speakers import write_page
    from lgl_plugin.utils.device import check_device

    show_notices()
    output, device = pathlib.Path(output), check_device(device)
    store = output / "embeddings"
    manifest, found = embed_folder(encoder, audio, store, device, num_workers)
    speech = find_speakers(
        encoder, manifest, found, threshold, speakers, device
    )
    write_speakers(output / "speakers.csv", speech)
    page = write_page(output / "index.html", speech, audio)
    print(
        f"{speech.n_speakers:,} speakers in {len(speech.files):,} files, by "
        f"{speech.rule}.\nIn {output}: speakers.csv; {page.name}, which plays "
        "each speaker's files; embeddings"
    )
