"""Labels and weights: loaded strictly, and without running anything."""

import pytest
import torch

from lgl_plugin.dataio.labels import read_labels, write_labels
from lgl_plugin.runs.weights import load_weights, save_weights


def test_weights_of_another_shape_are_refused(tmp_path):
    path = tmp_path / "encoder.ckpt"
    save_weights(torch.nn.Linear(2, 3), path)
    with pytest.raises(ValueError, match="another width"):
        load_weights(torch.nn.Linear(2, 4), path)


def test_loading_runs_no_code(tmp_path):
    """A pickle that would run something is refused, not run."""

    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    torch.save({"weight": Harm()}, tmp_path / "encoder.ckpt")
    with pytest.raises(ValueError, match="holds more than tensors"):
        load_weights(torch.nn.Linear(2, 3), tmp_path / "encoder.ckpt")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "text, line",
    [("", 0), ("a.wav,1\n", 1), ("ID,label\na.wav\n", 2)]
    + [(f"ID,label\na.wav,1\nb.wav,{n}\n", 3) for n in ("-1", "x", "9" * 30)]
    + [('ID,label\n"a\nb",1\n', 3), ("ID,label\n" + "a" * 150000, 2)],
)
def test_damaged_labels_are_named(tmp_path, text, line):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"labels.csv, line {line}"):
        read_labels(path)


def test_labels_are_parsed_once_until_they_change(tmp_path):
    path = tmp_path / "labels.csv"
    write_labels(path, ["a", "b"], torch.tensor([4, 0]))
    names, labels = read_labels(path)
    assert read_labels(path)[1] is labels
    with pytest.raises(ValueError, match="read-only"):
        labels[0] = 1
    write_labels(path, ["a", "b", "c"], torch.tensor([4, 0, 2]))
    names, labels = read_labels(path)
    assert list(names) == ["a", "b", "c"] and labels.tolist() == [4, 0, 2]
