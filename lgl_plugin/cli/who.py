"""`lgl who`: sorts the files of a folder by who speaks in them.

> lgl who results/lgl/1/export/iter5 /my/audio speakers
> lgl who results/lgl/1/export/iter5 /my/audio speakers --labels labels.csv
"""

import argparse

from lgl_plugin.cli.common import (
    ENCODER_HELP,
    add_channel,
    add_machine,
    cosine,
    left_out,
    show_notices,
)

MADE = ("speakers.csv", "index.html", "wrong_labels.csv")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    add = parser.add_argument
    add("encoder", help=ENCODER_HELP)
    add("audio", help="folder of audio files, each of one speaker")
    add("output", help="folder of the results")
    add(
        "--threshold",
        type=cosine,
        help="average cosine from which on two groups are one speaker; none: "
        "the encoder's",
    )
    add("--speakers", type=int, help="their number, if it is known")
    add(
        "--labels",
        help="csv of utterance,speaker: who speaks in some of the files; the "
        "others are named, strangers marked, and doubtful labels listed",
    )
    add_channel(parser)
    add_machine(parser)


def run(
    encoder: str,
    audio: str,
    output: str,
    threshold: float | None,
    speakers: int | None,
    labels: str | None,
    channel: int | None,
    device: str | None,
    num_workers: int | None,
) -> None:
    """Writes speakers.csv and a page that plays each speaker's files.

    With labels, wrong_labels.csv lists the labels that look wrong.
    """
    import pathlib

    from lgl_plugin.dataio.folder import refuse_recordings
    from lgl_plugin.dataio.given import read_given, read_names
    from lgl_plugin.inference.folder import embed_folder, refuse_foreign
    from lgl_plugin.inference.speakers import (
        find_speakers,
        write_speakers,
        write_wrong,
    )
    from lgl_plugin.report.speakers import write_page
    from lgl_plugin.utils.device import check_device

    if speakers is not None and labels:
        raise ValueError(
            f"--speakers={speakers} cannot be used with --labels: with labels "
            "the threshold decides who is a stranger. Leave one of them out"
        )
    if speakers is not None and threshold is not None:
        raise ValueError(
            f"--speakers={speakers} sets the number of speakers, so "
            "--threshold would have no effect. Leave one of them out"
        )
    if labels:
        read_names(labels)  # an error shows before the folder is read
    show_notices()
    output, device = pathlib.Path(output), check_device(device)
    store = output / "embeddings"
    given = None

    def check(manifest):
        nonlocal given
        given = read_given(labels, manifest.ids) if labels else None
        if speakers is not None and not 1 <= speakers <= len(manifest):
            raise ValueError(
                f"--speakers={speakers} must be from 1 to {len(manifest)}, the "
                "number of files"
            )

    refuse_recordings(output, audio)
    refuse_foreign(output, MADE, store)
    manifest, found = embed_folder(
        encoder, audio, store, device, num_workers, check, channel
    )
    speech = find_speakers(
        *(encoder, manifest, found, threshold, speakers, device, given),
        num_workers=num_workers,
        store=store,
    )
    write_speakers(output / "speakers.csv", speech)
    # An earlier call may have left the file for other labels.
    (output / "wrong_labels.csv").unlink(missing_ok=True)
    page = write_page(output / "index.html", speech, audio)
    print(
        f"{speech.n_speakers:,} speakers in {len(speech.files):,} files, by "
        f"{speech.rule}.{left_out(store)}\nIn {output}: speakers.csv; "
        f"{page.name}, which plays each speaker's files; embeddings"
    )
    if speech.named is not None:
        write_wrong(output / "wrong_labels.csv", speech)
        strangers = int((speech.labels >= len(speech.names)).sum())
        wrong = len(speech.named.wrong)
        print(
            f"{strangers:,} files are of strangers; {wrong:,} labels look "
            "wrong: wrong_labels.csv"
        )
