"""Manifests to datasets: crops, labels and replacements of bad audio."""

import pickle
import random

import numpy as np
import pytest
import soundfile
import torch
from speechbrain.dataio.dataloader import make_dataloader

from lgl_plugin.dataio import dataset
from lgl_plugin.dataio.audio import BadAudio
from lgl_plugin.dataio.bad_files import BadFiles
from lgl_plugin.dataio.dataset import UtteranceDataset, crop_dataset
from lgl_plugin.dataio.manifest import Manifest
from lgl_plugin.utils.signals import own_process_group


def manifest_of(**utterances):
    """A manifest of files, or of (file, duration)s, by ID."""
    rows = []
    for name, wav in utterances.items():
        wav, duration = wav if isinstance(wav, tuple) else (wav, 2.0)
        rows.append((name, str(wav), 0.0, duration, ""))
    return Manifest.of(rows)


def test_dataset_skips_bad_files_and_names_them(tmp_path, noise):
    (tmp_path / "b.wav").write_bytes(b"")
    soundfile.write(tmp_path / "c.wav", np.zeros(16000), 16000)
    data = crop_dataset(
        manifest_of(
            a=noise[0],
            b=tmp_path / "b.wav",
            c=(tmp_path / "c.wav", 1.0),
        ),
        np.arange(3),
        crop=0.5,
        labels=np.array([7, 8, 9]),
    )
    item = data[1]  # the next after b and c is a
    assert (item["id"], item["label"], item["row"]) == ("a", 7, 0)
    assert item["sig"].shape == (1, 8000)
    bad = [line.split("\t") for line in item["bad"].split("\n")]
    assert [name for name, _ in bad] == ["b", "c"]
    assert "silent" in bad[1][1]
    assert data[0]["bad"] == ""


def test_all_crops_of_an_utterance_have_one_speed_a_pass(tmp_path):
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(32000) / 16000)
    soundfile.write(tmp_path / "a.wav", tone, 16000)
    manifest = manifest_of(a=tmp_path / "a.wav")
    data = crop_dataset(manifest, np.arange(1), 0.5, 2, speeds=[90, 100, 110])
    found = set()
    for turn in range(20):
        spectra = np.abs(np.fft.rfft(data[turn]["sig"].numpy()))
        one, other = spectra.argmax(1)
        assert abs(int(one) - int(other)) <= 1
        found.add(round(one / 50))
        assert torch.equal(data[turn]["sig"], data[turn]["sig"])
    assert found == {9, 10, 11}


@pytest.mark.parametrize("overlap", [True, False])
def test_crops_of_a_short_utterance_overlap_or_are_repeated(tmp_path, overlap):
    rising = np.linspace(0.1, 0.9, 9600)  # 0.6 s
    soundfile.write(tmp_path / "a.wav", rising, 16000)
    manifest = manifest_of(a=(tmp_path / "a.wav", 0.6))
    data = crop_dataset(manifest, np.arange(1), 0.5, 2, overlap=overlap)
    falls = (data[0]["sig"].diff() < -0.1).sum(1)  # where a repetition begins
    assert falls.tolist() == ([0, 0] if overlap else [1, 1])


def test_channels_of_one_recording_are_apart(tmp_path):
    """Two talkers on the telephone, each on a channel."""
    path = tmp_path / "call.wav"
    soundfile.write(path, np.tile([0.25, 0.5], (16000, 1)), 16000)
    manifest = Manifest.of(
        (str(channel), str(path), 0.0, 1.0, "", channel, None)
        for channel in (0, 1, None)
    )
    data = crop_dataset(manifest, np.arange(3), crop=0.5)
    assert [data[row]["sig"].mean().item() for row in range(3)] == (
        pytest.approx([0.25, 0.5, 0.375], abs=1e-4)
    )


def test_dataset_with_nothing_readable_ends(tmp_path):
    missing = manifest_of(a=tmp_path / "a", b=tmp_path / "b")
    data = crop_dataset(missing, np.arange(2), crop=0.5)
    with pytest.raises(BadAudio, match="none of the 2 utterances.* back"):
        data[0]


def test_a_folder_that_is_gone_makes_no_long_list_of_bad_files(
    tmp_path, noise, monkeypatch
):
    """A thousand in a row end the training; here three do."""
    monkeypatch.setattr(dataset, "IN_A_ROW", 3)
    gone = {name: tmp_path / name for name in "abc"}
    data = crop_dataset(manifest_of(**gone, d=noise[0]), np.arange(4), crop=0.5)
    with pytest.raises(BadAudio, match="3 utterances in a row .* not counted"):
        data[0]
    assert len(data[1]["bad"].splitlines()) == 2


def test_other_errors_are_not_swallowed():
    def read(row):
        raise ZeroDivisionError

    data = UtteranceDataset(manifest_of(a="x"), np.arange(1))
    data.add_dynamic_item(read, takes="row", provides="sig")
    data.set_output_keys(["sig"])
    with pytest.raises(ZeroDivisionError):
        data[0]


def test_rows_and_labels_choose_the_utterances(noise):
    data = crop_dataset(
        manifest_of(a=noise[0], b=noise[0], c=noise[0], d=noise[0]),
        np.array([3, 2, 1]),
        crop=0.5,
        labels=np.array([1, -1, 0, 2]),
    )
    items = [data[i] for i in range(len(data))]
    assert [(i["id"], i["row"], i["label"]) for i in items] == [
        ("d", 3, 2),
        ("c", 2, 0),
    ]
    assert type(items[0]["label"]) is int
    assert [item["id"] for item in data] == ["d", "c"]  # and no further


def test_crops_follow_from_seed_epoch_and_utterance(noise):
    manifest = manifest_of(a=noise[0], b=noise[0])
    rows = np.arange(2)
    data, again, other = (
        crop_dataset(manifest, rows, 0.25, n_crops=2, seed=seed)
        for seed in (1, 1, 2)
    )
    state = random.getstate()
    assert torch.equal(data[0]["sig"], data[0]["sig"])
    assert random.getstate() == state
    assert not torch.equal(data[0]["sig"], data[1]["sig"])
    assert not torch.equal(data[0]["sig"], other[0]["sig"])
    first = data[0]["sig"]
    data.set_epoch(1)
    assert not torch.equal(data[0]["sig"], first)
    again.set_epoch(1)
    assert torch.equal(data[0]["sig"], again[0]["sig"])
    # A later pass, by an index beyond the end: the same utterance, new crops.
    later = again[2 * 2]
    assert later["id"] == again[0]["id"]
    assert not torch.equal(later["sig"], again[0]["sig"])
    again.set_epoch(3)
    assert torch.equal(later["sig"], again[0]["sig"])


@pytest.mark.parametrize("persistent", [False, True])
def test_crops_do_not_depend_on_who_reads(noise, persistent):
    manifest = manifest_of(a=noise[0], b=noise[0], c=noise[0])
    data = crop_dataset(manifest, np.arange(3), 0.25, seed=3)
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=2, persistent_workers=persistent
    )
    for epoch in (1, 2):
        data.set_epoch(epoch)
        for here, there in zip(data, loader, strict=True):
            assert torch.equal(here["sig"], there["sig"])


def test_a_pickled_dataset_gives_the_same_items(noise):
    """With crops of an epoch that is set after the copy was made."""
    manifest = manifest_of(a=noise[0], b=noise[0])
    data = crop_dataset(
        manifest, np.arange(2), 0.25, labels=np.array([4, 5]), seed=3
    )
    copy = pickle.loads(pickle.dumps(data))
    for epoch in (0, 2):
        data.set_epoch(epoch)
        copy.set_epoch(epoch)
        for here, there in zip(data, copy, strict=True):
            assert torch.equal(here.pop("sig"), there.pop("sig"))
            assert here == there and type(there["label"]) is int


def test_spawned_loaders_read_the_same_batch(noise):
    """As on macOS and Windows, whose processes get a pickled dataset."""
    manifest = manifest_of(a=noise[0], b=noise[0])
    data = crop_dataset(
        manifest, np.arange(2), 0.25, labels=np.array([4, 5]), seed=3
    )
    options = {"batch_size": 2, "worker_init_fn": own_process_group}
    loaders = [
        make_dataloader(data, **options),
        make_dataloader(
            data,
            **options,
            num_workers=1,
            multiprocessing_context="spawn",
            persistent_workers=True,
        ),
    ]
    for epoch in (1, 2):  # the process of epoch 1 reads epoch 2, too
        data.set_epoch(epoch)
        here, there = (next(iter(loader)) for loader in loaders)
        assert torch.equal(here.sig.data, there.sig.data)
        assert here.label.tolist() == there.label.tolist() == [4, 5]
        assert here.id == there.id == ["a", "b"]


def test_a_file_that_turns_bad_stops_no_epoch(tmp_path, noise):
    """It is counted once; the others take its place from then on."""
    (tmp_path / "b.wav").write_bytes(noise[0].read_bytes())
    manifest = manifest_of(a=noise[0], b=tmp_path / "b.wav", c=noise[0])
    data = crop_dataset(manifest, np.arange(3), crop=0.5)
    bad = BadFiles(tmp_path / "bad_files.txt", limit=1)

    def epoch():
        items = [data[index] for index in range(3)]
        for item in items:
            lines = item["bad"].splitlines()
            bad.add(line.split("\t", 1) for line in lines)
        return [item["id"] for item in items]

    assert epoch() == ["a", "b", "c"]
    (tmp_path / "b.wav").unlink()
    for _ in range(3):
        assert epoch() == ["a", "c", "c"]
    reason = "cannot be opened: No such file or directory"
    assert bad.path.read_text() == f"b\t{reason}\n"
