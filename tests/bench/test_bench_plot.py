import pytest
from matplotlib.figure import Figure
from PIL import Image

from sf_mllm.bench.plot import plot_rows
from sf_mllm.bench.rows import Row, append_rows
from sf_mllm.errors import InputError


def make_row(model, tokens, ms, **changes):
    row = Row(
        "encoder-speed-1", "encoder", model, weights="random", visual_tokens=tokens, width=224, height=224, batch=1
    )
    row.precision, row.mode = "float32", "eager"
    row.time_ms, row.time_ms_q25, row.time_ms_q75, row.images_per_s = ms, 0.9 * ms, 1.1 * ms, 1000 / ms
    for name, value in changes.items():
        setattr(row, name, value)
    return row


@pytest.fixture
def write(tmp_path):
    def write(*rows, device="CPU x", name="throughput.csv"):
        path = tmp_path / name
        append_rows(path, [row.to_record({"device": device, "torch": "2"}) for row in rows])
        return path

    return write


@pytest.fixture
def drawn(monkeypatch):
    """The axes of the figures that are written."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: figures.append(self) or save(self, *args, **kwargs)
    )
    return lambda: [
        {
            (float(line.get_xdata()[0]), float(line.get_ydata()[0]))
            for line in axes.lines
            if line.get_marker() in "osD^v"
        }
        for axes in figures[-1].axes
    ]


def test_latency_and_rate_against_tokens(write, drawn):
    file = write(
        make_row("ours", 49, 9.0),
        make_row("ours", 49, 10.0),  # measured again
        make_row("vit", 576, 40.0),
        make_row("ours", 49, 20.0, batch=4, images_per_s=200.0),
        make_row("large", 576, 30.0, outcome="out of memory"),
        make_row("any", "", 1.0, step="decode"),
    )
    assert plot_rows(file) == file.with_suffix(".png")
    with Image.open(file.with_suffix(".png")) as picture:
        assert picture.width > picture.height > 300
    latency, rate = drawn()
    assert latency == {(49, 10), (576, 40)} and rate == {(49, 200)}


def test_against_accuracy(write, drawn, tmp_path):
    file = write(make_row("ours", 49, 10.0), make_row("vit", 576, 40.0), make_row("other", 100, 20.0))
    (tmp_path / "accuracy.csv").write_text("model,accuracy\nours,61.5\nvit,62\n")
    plot_rows(file, tmp_path / "a.svg", tmp_path / "accuracy.csv")
    assert drawn()[0] == {(61.5, 10), (62, 40)}


def test_several_sizes_have_a_panel_of_their_own(write, drawn):
    file = write(*(make_row("ours", 49, ms, width=width, height=width) for width, ms in ((448, 12.0), (224, 10.0))))
    plot_rows(file)
    latency, _, sizes = drawn()
    assert latency == {(49, 12)} and sizes == {(0.050176, 10)}


def test_only_the_last_device_is_drawn(write, drawn):
    write(make_row("ours", 49, 10.0), device="old")
    plot_rows(write(make_row("ours", 49, 1.0), device="new"))
    assert drawn()[0] == {(49, 1)}


def test_what_cannot_be_drawn_is_refused(write, tmp_path):
    file = write(make_row("any", "", 1.0, step="decode"))
    with pytest.raises(InputError, match="holds no complete row of an encoder"):
        plot_rows(file)
    with pytest.raises(InputError, match=r"ends in \.png, \.svg, \.pdf"):
        plot_rows(file, tmp_path / "a.gif")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="lacks the columns step, model"):
        plot_rows(tmp_path / "other.csv")
    measured = write(make_row("ours", 49, 10.0))
    for text, message in (
        ("model,accuracy\nour,1\n", "Did you mean 'ours'"),
        ("model,accuracy\nours,high\n", "Accuracy 'high' of 'ours'"),
        ("model\nours\n", "lacks the columns accuracy"),
    ):
        (tmp_path / "accuracy.csv").write_text(text)
        with pytest.raises(InputError, match=message):
            plot_rows(measured, accuracy=tmp_path / "accuracy.csv")
    with pytest.raises(InputError, match="cannot be written"):
        plot_rows(measured, tmp_path / "nowhere" / "a.png")
