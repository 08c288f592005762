"""The data of a session: manifest, labels, bad files, loaders."""

import functools
import os
import pathlib

from speechbrain.utils.logger import get_logger

from lgl_plugin.dataio.bad_files import BadFiles
from lgl_plugin.dataio.bandwidths import try_some, warn_of_bandwidths
from lgl_plugin.dataio.given import GivenLabels, read_given
from lgl_plugin.dataio.manifest import Manifest, run_manifest
from lgl_plugin.dataio.prepare import prepare_manifest
from lgl_plugin.dataio.trials import trial_paths
from lgl_plugin.inference.extractor import BATCH_SECONDS
from lgl_plugin.runs.run import Run, stage1_steps
from lgl_plugin.runs.schema import Settings
from lgl_plugin.utils.device import check_shared_memory
from lgl_plugin.utils.distributed import from_main, world_size
from lgl_plugin.utils.files import checksum

logger = get_logger(__name__)


def read_data(
    settings: Settings, run: Run
) -> tuple[Manifest, GivenLabels | None, BadFiles]:
    """Makes or reuses the manifest; reads labels and bad files.

    Inputs from outside the run are recorded. Raises ValueError if an input does
    not fit, or if too many files are bad already.
    """
    path = pathlib.Path(settings.manifest or run.folder / "manifest.csv")
    if not settings.manifest:
        # from_main raises its errors on every rank, so that no rank waits.
        prepare = functools.partial(
            prepare_manifest,
            train_folder=settings.train_folder,
            manifest=path,
            data_root=settings.data_folder,
            speaker_folder=settings.speaker_folder,
            trials=settings.verification_file,
            trial_folder=settings.trial_folder,
            max_bad_share=settings.max_bad_share,
            sample_rate=settings.sample_rate,
            channel=settings.channel,
            accept=functools.partial(accept_manifest, settings, run),
        )
        from_main(prepare)
    run.record_input("manifest", path)
    manifest = run_manifest(run.folder, vars(settings))
    if settings.manifest and settings.verification_file:
        _warn_of_tested(settings, manifest)
    log = run.folder / "bad_files.txt"
    from_main(_forget_mended, log, manifest, settings.manifest)
    bad_files = BadFiles(log)
    bad = bad_files.reasons
    # The share counts all files, also those outside the manifest.
    n_files = len(bad) + sum(name not in bad for name in manifest.ids)
    bad_files.limit = int(settings.max_bad_share * n_files)
    bad_files.check()  # starting again must not lift the limit
    given = None
    if settings.stage == 2 and settings.labels_file:
        given = read_given(settings.labels_file, manifest.ids)
        run.record_input("labels_file", settings.labels_file)
    return manifest, given, bad_files


def _forget_mended(log, manifest, own):
    """Removes from the log of bad files those that have since been mended.

    `own` is the path of a user's own list, None for a scanned folder.
    """
    bad = BadFiles(log)
    if not bad.reasons:
        return
    written = log.stat().st_mtime_ns

    def is_newer(path):
        # The inode's time, because a file that is copied over another may keep
        # an old modification time.
        try:
            return os.stat(path).st_ctime_ns > written
        except OSError:  # still missing
            return False

    rows = zip(manifest.ids, manifest.wavs)
    listed = {name: wav for name, wav in rows if name in bad.reasons}
    if own and is_newer(own):
        mended = {*bad.reasons}
    else:
        mended = {name for name, wav in listed.items() if is_newer(wav)}
        # The log of a scanned folder also names files outside its list.
        mended |= bad.reasons.keys() - listed if own else set()
    if mended:
        bad.forget(mended)


def try_manifest(
    settings: Settings, manifest: Manifest, bad_files: BadFiles
) -> None:
    """Reads some files of a user's list, because no scan has read them."""
    rate = settings.sample_rate
    bad, rates = try_some(manifest, rate)
    if not rates:  # none counts as bad: the folder may be wrong
        raise ValueError(
            f"manifest: none of {len(bad)} utterances tried of "
            f"{settings.manifest} can be used. The first is "
            f"{': '.join(bad[0])}. Either its start and stop do not fit the "
            f"files, or --data_folder, now {settings.data_folder}, is not "
            "what $data_root stands for there."
        )
    bad_files.add(bad)  # raises if there are too many already
    narrow = sum(value < rate for value in rates)
    lowest = min(rates, default=rate)
    source = f"files tried of {settings.manifest}"
    warn_of_bandwidths(narrow, len(rates), lowest, rate, source)


def _warn_of_tested(settings, manifest):
    """Warns of utterances of the user's list that are also trial utterances.

    The recipe leaves such utterances out of its own lists.
    """
    tested = trial_paths(settings.verification_file, settings.trial_folder)
    # The cache limits realpath's system calls to one per folder.
    real = functools.lru_cache(maxsize=None)(os.path.realpath)
    places = (os.path.split(wav) for wav in manifest.wavs)
    number = sum(
        os.path.join(real(folder), name) in tested for folder, name in places
    )
    if number:
        logger.warning(
            "%d of %d utterances of %s are also in %s: the error rates on "
            "that list will be too low",
            number,
            len(manifest),
            settings.manifest,
            settings.verification_file,
        )


def accept_manifest(settings: Settings, run: Run, path: pathlib.Path) -> None:
    """Refuses audio that differs from that of the steps in the run folder.

    Both stages share the manifest: Stage II on another corpus would replace
    Stage I's manifest.
    """
    current = checksum(path)
    for stage, inputs in run.inputs.items():
        if inputs.get("manifest", current) != current:
            last = stage1_steps(run.settings)[-1]
            raise ValueError(
                f"{run.folder} holds {stage} of other audio than "
                f"{settings.train_folder} has now. Nothing was "
                "changed. Bring that audio back, or set another "
                "--output_folder; Stage II takes an encoder from here by "
                f"--pretrained_encoder={run.folder / last}."
            )


def check_loaders(settings: Settings, device: str) -> None:
    """Logs the size of a batch; refuses batches that exceed shared memory."""
    options = settings.dataloader_options
    if world_size() > 1:
        logger.info(
            "batch_size: %d in each of %d processes, %d in all; lr: %g",
            *(options.batch_size, world_size()),
            *(options.batch_size * world_size(), settings.lr),
        )
    if options.num_workers:
        seconds = 2 * settings.crop_seconds * options.batch_size
        if device != "cpu":  # the extractor's batches are larger
            seconds = max(seconds, BATCH_SECONDS)
        batch = int(4 * seconds * settings.sample_rate)  # float32
        # All processes of this machine share that memory.
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        check_shared_memory(here * options.read_ahead * batch)
