"""The order in which shards are read."""

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings, strategies as st
from speechbrain.dataio.dataloader import SaveableDataLoader
from speechbrain.dataio.sampler import DistributedSamplerWrapper
from speechbrain.utils.checkpoints import Checkpointer

from lgl_plugin.dataio.dataset import crop_dataset
from lgl_plugin.dataio.manifest import load_manifest
from lgl_plugin.dataio.sampler import PassSampler, shard_numbers
from lgl_plugin.dataio.shards import write_shards


def windowed(window, *options):
    """A sampler that reads so many shards at a time."""
    sampler = PassSampler(*options)
    sampler.window = window
    return sampler


@given(
    st.integers(0, 12),
    st.integers(1, 20),
    st.integers(1, 14),
    st.integers(0, 9),
)
@settings(max_examples=100, deadline=None)
def test_each_index_once_and_few_shards_at_a_time(n, size, window, turn):
    numbers = np.random.default_rng(0).permutation(np.repeat(range(n), size))
    numbers = numbers.astype(int)
    total = n * size
    sampler = windowed(window, total, total, 1, numbers)
    sampler.set_epoch(turn + 1)
    stream = list(sampler)
    assert all(type(index) is int for index in stream)
    order = [index - turn * total for index in stream]
    assert sorted(order) == list(range(total))
    assert len(sampler) == total
    first, last = {}, {}
    for place, shard in enumerate(numbers[order]):
        first.setdefault(shard, place)
        last[shard] = place
    for place in range(len(order)):
        reading = [s for s in last if first[s] <= place <= last[s]]
        assert len(reading) <= window


@given(
    st.integers(1, 30),
    st.integers(1, 70),
    st.integers(1, 6),
    st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_epochs_of_any_length_leave_no_utterance_out(size, length, n, shards):
    """Visits differ by one at most, and no pass repeats an index."""
    numbers = np.arange(size) // 3 if shards else None
    sampler = windowed(2, size, length, 5, numbers)
    stream = []
    for epoch in range(1, n + 1):
        sampler.set_epoch(epoch)
        stream += list(sampler)
    assert len(stream) == n * length
    assert len(set(stream)) == len(stream)
    turns = np.array(stream) // size
    assert (np.diff(turns) >= 0).all()  # one pass after the other
    visits = np.bincount(np.array(stream) % size, minlength=size)
    assert visits.max() - visits.min() <= 1


def test_order_follows_from_seed_and_pass():
    numbers = np.repeat(np.arange(16), 25)

    def order(turn, seed=7):
        sampler = windowed(4, 400, 400, seed, numbers)
        sampler.set_epoch(turn + 1)
        return [index - 400 * turn for index in sampler]

    zero, one = order(0), order(1)
    assert zero == order(0)
    assert one != zero
    # Runs of neighbouring seeds share no order.
    assert one != order(0, seed=8)
    # Other shards are together, and their utterances are mixed.
    assert set(numbers[zero[:100]]) != set(numbers[one[:100]])
    assert len(set(numbers[zero[:25]])) == 4


@pytest.mark.parametrize("world", [2, 3, 8])
def test_ranks_share_without_repeats(world):
    numbers = np.repeat(np.arange(12), 40)  # 480, which all of them divide

    def indices(rank, epoch):
        # As Brain.fit wraps a sampler under DDP.
        wrapped = DistributedSamplerWrapper(
            windowed(3, 480, 480, 0, numbers),
            num_replicas=world,
            rank=rank,
            drop_last=False,
            shuffle=False,
        )
        wrapped.set_epoch(epoch)
        return [index % 480 for index in wrapped]

    for epoch in (1, 2):
        parts = [indices(rank, epoch) for rank in range(world)]
        assert sorted(sum(parts, [])) == list(range(480))
        # Ranks read the same few shards at a time.
        share = 120 // world
        for step in range(0, 4 * share, share):
            now = [i for part in parts for i in part[step : step + share]]
            assert len(set(numbers[now])) == 3
    assert indices(0, 1) != indices(0, 2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A dataset of crops in shards, and the shard of each."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = ["ID,duration,wav,start,stop,spk_id\n"]
    for n in range(24):
        samples = np.random.default_rng(n).uniform(-0.9, 0.9, 4000)
        soundfile.write(folder / f"{n}.wav", samples, 16000)
        lines.append(f"{n}.wav,0.25,$data_root/{n}.wav,0,4000,\n")
    (folder / "in.csv").write_text("".join(lines))
    made = write_shards(
        folder / "in.csv", folder, folder / "shards", 0.05, num_workers=1
    )
    manifest = load_manifest(made, made.parent)
    data = crop_dataset(manifest, np.arange(24), 0.1)
    return data, shard_numbers(manifest.wavs)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_share_without_repeats(corpus, workers):
    data, numbers = corpus
    sampler = windowed(2, 24, 24, 0, numbers)
    loader = SaveableDataLoader(
        data, 4, sampler=sampler, num_workers=workers, collate_fn=list
    )
    found = [item["id"] for batch in loader for item in batch]
    assert found == [data[index]["id"] for index in sampler]
    assert len(set(found)) == 24


@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_in_mid_epoch(tmp_path, corpus, workers):
    data, numbers = corpus

    def make():
        sampler = windowed(2, 24, 24, 0, numbers)
        sampler.set_epoch(3)
        loader = SaveableDataLoader(
            data, 4, sampler=sampler, num_workers=workers, collate_fn=list
        )
        return loader, Checkpointer(tmp_path, {"loader": loader})

    loader, checkpointer = make()
    left = []
    for step, batch in enumerate(loader):
        if step == 2:
            checkpointer.save_checkpoint(end_of_epoch=False)
        if step > 2:
            left += [item["id"] for item in batch]
    assert len(left) == 12

    loader, checkpointer = make()
    checkpointer.recover_if_possible()
    assert [item["id"] for batch in loader for item in batch] == left


def test_numbers_of_shards():
    assert shard_numbers([]).dtype == np.int64
    wavs = ["y", "x", "y", "z", "x"]
    assert shard_numbers(wavs).tolist() == [0, 1, 0, 2, 1]


@pytest.mark.parametrize("shards", [None, np.arange(300) // 10])
def test_classes_are_drawn_alike_whatever_their_size(shards):
    classes = np.repeat([7, 3, 5], [10, 90, 200])
    sampler = PassSampler(300, 300 * 40, 1, shards, classes)
    stream = np.array(list(sampler))
    assert (np.bincount(stream // 300) == 300).all()  # passes as without
    drawn = np.bincount(classes[stream % 300])[[7, 3, 5]] / len(stream)
    # Of 12,000 draws the deviation of a share is 0.004.
    assert np.abs(drawn - 1 / 3).max() < 0.02
    assert len(set(stream % 300)) == 300
    again = list(PassSampler(300, 300 * 40, 1, shards, classes))
    assert again == stream.tolist()
