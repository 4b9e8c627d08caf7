"""What the report of `protect` shows."""

import math

import pytest
import torch
from torch import nn

from helpers.small_encoder import encoder, state_of, vectors_like
from rmtllmf.channel import transmit
from rmtllmf.resilience import protect
from rmtllmf.resilience._protection import Protection, TensorReport
from rmtllmf.taskvec import TaskVector


class TestReport:
    def test_a_long_one_is_cut_and_its_columns_line_up(self):
        model = nn.ModuleDict({f"layer{i}": nn.Linear(8, 8) for i in range(25)})
        base = state_of(model)
        sent = vectors_like(base, size=1.0)
        for vector in sent:
            for name in vector:
                vector[name] *= 0.001 if int(name[5:].split(".")[0]) > 10 else 1
        lines = repr(protect(model, base, transmit(sent, 1.0, seed=0), 1.0, seed=0)).splitlines()
        assert len(lines) == 3 + 5 + 1 + 5 + 1
        assert lines[8] == "    ... 40 in between ..."
        rows = lines[2:8] + lines[9:14]
        assert len({len(row) for row in rows}) == 1
        kept = [float(row.split()[-1]) for row in rows[1:]]
        assert kept == sorted(kept, reverse=True)
        counts = [int(word) for word in lines[1].replace(",", "").split() if word.isdigit()]
        assert sum(counts) == 50
        assert min(counts) > 5

    def test_names_may_be_shorter_than_the_headline(self):
        tensors = {"w": TensorReport(1.0, 2.0, 0.4), "b": TensorReport(0.0, 2.0, 0.0)}
        update = TaskVector({"w": torch.ones(1)})
        rows = repr(Protection((0,), {}, None, tensors, 1.0, update, None)).splitlines()[2:5]
        assert len({len(row) for row in rows}) == 1

    @pytest.mark.parametrize(
        ("signal", "noise", "text"),
        [
            (1.0, 10.0, "-10.0"),
            (1e-300, 1e300, "-6000.0"),
            (0.0, 1.0, "no signal"),
            (1.0, 0.0, "no noise"),
            (1.0, math.inf, "no signal"),
        ],
    )
    def test_a_row(self, signal, noise, text):
        assert str(TensorReport(signal, noise, 0.5)) == f"{text:>9}  0.500"

    def test_signal_and_noise_are_those_of_what_was_sent(self, setting):
        """1328 x 4 numbers: their mean square is known to 2 %, that of signal and noise of 0 dB to about 5."""
        base = setting[0]
        done = protect(encoder(), base, transmit(vectors_like(base), 1.0, seed=0, scale=0.05), 1.0, seed=0, scale=0.05)
        report = done.tensors["0.weight"]
        assert report.signal == pytest.approx(0.05**2, rel=0.2)
        assert report.noise == pytest.approx(0.05**2, rel=1e-9)
        assert report.kept == pytest.approx(math.sqrt(0.5 * 0.5), rel=0.1)  # half of it, all of that shrunk by half
