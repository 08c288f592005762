"""Datasets over manifests: random crops, without decoding whole files.

An utterance is read as one crop (Stage II) or as several (Stage I). Bad audio
never reaches the network: the next utterance replaces the bad one, and
`BadFiles` logs the bad one.
"""

import contextlib
import functools
import operator
import random
from collections.abc import Sequence

import numpy as np
import torch
from speechbrain.dataio.dataset import DynamicItemDataset

from lgl_plugin.dataio.audio import BadAudio
from lgl_plugin.dataio.crops import read_crops
from lgl_plugin.dataio.manifest import Manifest
from lgl_plugin.dataio.partners import Partners
from lgl_plugin.utils.signals import own_process_group

# A loader's time limit for a batch, enough for one process on the slowest disk.
# Without a limit a loader waits for ever for a process that hangs.
SECONDS_PER_BATCH = 600
# The most consecutive utterances that may be unreadable. More mean that the
# storage is gone, and would fill the list of bad files with good ones.
IN_A_ROW = 1000


def loader_options(device: str | torch.device, num_workers: int) -> dict:
    """Returns options of a loader that reads audio for a device."""
    return {
        "num_workers": num_workers,
        # The GPU fetches a batch from pinned memory while it still computes.
        "pin_memory": torch.device(device).type == "cuda",
        "timeout": SECONDS_PER_BATCH if num_workers else 0,
        "worker_init_fn": own_process_group,
    }


class UtteranceDataset(DynamicItemDataset):
    """A DynamicItemDataset over a manifest that survives bad audio.

    An utterance whose reading raises `BadAudio` is replaced by the next one,
    so that batches keep their size. The item then names the bad utterances
    under the key `bad`, as lines of `ID<TAB>reason` (text, because SpeechBrain
    would transpose a batch of lists). The other keys are id, row (in the
    manifest) and turn, the number of the pass, from 0. `rows`, int64, are the
    rows of the manifest to use, at least one.

    The index also has the pass, as `PassSampler` counts it: in a dataset of n
    items, index 2 n + 3 is item 3 in turn 2.
    """

    def __init__(self, manifest: Manifest, rows: np.ndarray) -> None:
        first = int(rows[0])
        # SpeechBrain would make a list of a million Python objects, which every
        # loader process would copy. It gets one row, for the keys; then the
        # attributes are set to the manifest, whose arrays forked processes
        # share.
        super().__init__({first: {"row": first, "turn": 0}})
        self.data, self.data_ids = manifest, rows
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch to draw crops for; for samplers without passes."""
        # In place: persistent loader processes have their own copy of this
        # object, and see only changes in the tensor's shared memory.
        self.epoch.fill_(epoch)

    def __iter__(self):
        # By default Python iterates until an IndexError, which never comes.
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict:
        turn = index // len(self)
        bad = []
        for step in range(min(len(self), IN_A_ROW)):
            row = int(self.data_ids[(index + step) % len(self)])
            utterance = self.data.ids[row]
            try:
                inputs = {"id": utterance, "row": row, "turn": turn}
                item = self.pipeline.compute_outputs(inputs)
            except BadAudio as error:
                reason = " ".join(str(error).split())
                bad.append(f"{utterance}\t{reason}")
            else:
                return {**item, "bad": "\n".join(bad)}
        words = f"{len(bad):,} utterances in a row cannot be read"
        if len(bad) == len(self):
            words = f"none of the {len(bad):,} utterances can be read"
        raise BadAudio(
            f"{words}; the first: {bad[0]}. If their folder is back, start "
            "the same command again: they are not counted as bad."
        )


def crop_dataset(
    manifest: Manifest,
    rows: np.ndarray,
    crop: float,
    n_crops: int = 1,
    labels: np.ndarray | None = None,
    sample_rate: int = 16000,
    seed: int = 0,
    speeds: Sequence[int] = (100,),
    partners: Partners | None = None,
    overlap: bool = False,
) -> UtteranceDataset:
    """Makes a dataset of random crops, with pseudo-labels if they are given.

    An utterance's crops depend only on the seed, the pass over the data (or
    the epoch, see `set_epoch`), its ID and its partners. An interrupted epoch
    therefore resumes with the same crops, however many processes read.

    Arguments
    ---------
    manifest : lgl_plugin.dataio.manifest.Manifest
        The corpus.
    rows : numpy.ndarray
        The rows of its utterances to use, int64.
    crop : float
        Length of a crop in seconds.
    n_crops : int
        Crops per utterance.
    labels : numpy.ndarray, optional
        A label for each of the manifest's rows, int64 (N,); utterances with
        -1 have none and are left out.
    sample_rate : int
        The rate to convert to, in Hz.
    seed : int
        The seed of the crops.
    speeds : sequence of int
        In %; an utterance gets one at random in each pass, for all of its
        crops. 110 is faster and higher.
    partners : lgl_plugin.dataio.partners.Partners, optional
        The source of the second of two crops: a partner is drawn for each
        utterance in each pass. If the partner cannot be read, both crops are
        of the utterance.
    overlap : bool
        Whether an utterance's crops may overlap. If not, an utterance that is
        too short for disjoint crops gives shorter ones, which are repeated.

    Returns
    -------
    UtteranceDataset
        With the keys id, sig (n_crops, time), row and, given labels, label.
        Given partners, `partner` is the row of the second crop.

    Example
    -------
    >>> import soundfile
    >>> path = getfixture("tmp_path") / "tone.wav"
    >>> soundfile.write(path, np.full(16000, 0.5), 16000)
    >>> manifest = Manifest.of([("a", str(path), 0.0, 1.0, "")])
    >>> data = crop_dataset(manifest, np.array([0]), 0.5, labels=np.array([3]))
    >>> data[0]["sig"].shape, data[0]["label"]
    (torch.Size([1, 8000]), 3)
    """
    if labels is not None:
        rows = rows[labels[rows] >= 0]
    dataset = UtteranceDataset(manifest, rows)
    # No closures: loaders that spawn their processes pickle the dataset.
    size = {"crop": crop, "sample_rate": sample_rate, "overlap": overlap}
    source = manifest, size, n_crops, tuple(speeds), partners
    read = functools.partial(_read, dataset.epoch, seed, *source)
    dataset.add_dynamic_item(read, takes=["turn", "row"], provides="crops")
    keys = ["id", "sig", "row"]
    for place, name in enumerate(("sig", "partner")):
        dataset.add_dynamic_item(operator.itemgetter(place), "crops", name)
    if partners is not None:
        keys.append("partner")
    if labels is not None:
        # `labels.item` returns a Python int, which SpeechBrain can batch.
        dataset.add_dynamic_item(labels.item, takes="row", provides="label")
        keys.append("label")
    dataset.set_output_keys(keys)
    return dataset


def _read(epoch, seed, manifest, size, n_crops, speeds, partners, turn, row):
    """Reads crops of an utterance, or one of it and one of its partner.

    Returns the crops and the row of the last crop.
    """
    # From seed, pass and utterance alone: a resumed epoch draws the same.
    rng = random.Random(f"{seed} {epoch.item() + turn} {manifest.ids[row]}")
    partner = row if partners is None else partners.draw(rng, row)
    speed = rng.choice(speeds) if len(speeds) > 1 else speeds[0]

    def crops(row, n_crops):
        source = {**manifest[row], **size, "n_crops": n_crops}
        return read_crops(**source, rng=rng, speed=speed)

    if partner != row:
        # Either may be bad. If it is the utterance and not its partner, the
        # read below raises BadAudio again.
        with contextlib.suppress(BadAudio):
            return torch.cat([crops(row, 1), crops(partner, 1)]), partner
    return crops(row, n_crops), row
