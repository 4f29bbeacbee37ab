import io
import logging
import pickle

import numpy as np
import pytest
import torch
import webdataset
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from PIL import Image
from torch.utils.data import DataLoader

from sf_mllm.data.augment import CropSettings, ImageKey, RandomViews
from sf_mllm.data.image_specs import open_images
from sf_mllm.data.image_streams import ShardSizes, StreamedImages
from sf_mllm.data.shared_log import SharedLog, UnreadableImages
from sf_mllm.data.tar_shards import TarShards
from sf_mllm.errors import InputError

PER_SHARD = 7


def encode(value, image_format="PNG"):
    """An image whose content tells its number."""
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (value, value, value)).save(buffer, image_format)
    return buffer.getvalue()


def write_shard(path, samples):
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for number, sample in enumerate(samples):
            writer.write({"__key__": f"{number:05d}"} | sample)
    return str(path)


@pytest.fixture
def urls(tmp_path):
    """Six shards of seven images and a label each; image i of shard s has the value 10 s + i."""
    return [
        write_shard(tmp_path / f"{s}.tar", [{"png": encode(10 * s + i), "cls": b"3"} for i in range(PER_SHARD)])
        for s in range(6)
    ]


class KeyedViews(RandomViews):
    def cut(self, image, key, epoch, resolution):
        return super().cut(image, key, epoch, resolution) | {"key": key, "epoch": epoch}


def make_stream(urls, tmp_path, *, lanes=2, block=4, num_samples=200, seed=1, share=0.0, buffer=3, name="run"):
    (tmp_path / name).mkdir(exist_ok=True)
    settings = CropSettings(resolutions=((8, 8),))
    return StreamedImages(
        TarShards(urls),
        range(len(urls)),
        num_lanes=lanes,
        block=block,
        num_samples=num_samples,
        step_size=block,
        views=KeyedViews(settings, seed),
        resolutions=settings.resolutions,
        seed=seed,
        shuffle_buffer=buffer,
        unreadable=UnreadableImages(SharedLog(tmp_path / name / "unreadable.jsonl"), share),
        sizes=ShardSizes(SharedLog(tmp_path / name / "sizes.jsonl")),
    )


def number_of(sample):
    return int(sample["pixel_values"].float().mean())


def numbers(stream, positions=None):
    return [number_of(stream[position]) for position in positions or range(len(stream))]


def read(loader):
    return [number_of(sample) for batch in loader for sample in batch]


EVERYTHING = [10 * s + i for s in range(6) for i in range(PER_SHARD)]


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_every_epoch_has_each_image_once_in_another_order(urls, tmp_path, lanes):
    stream = make_stream(urls, tmp_path, lanes=lanes, block=7, num_samples=42 * 3)
    found = numbers(stream)
    epochs = [found[start : start + 42] for start in (0, 42, 84)]
    assert all(sorted(epoch) == EVERYTHING for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [stream[position]["epoch"] for position in (0, 41, 42, 125)] == [0, 0, 1, 2]
    assert stream.epochs_after(len(stream)) == 3
    other = make_stream(urls, tmp_path, lanes=lanes, block=7, num_samples=42, seed=2, name="other")
    assert other.epochs_after(10) == 0 and numbers(other) != epochs[0]


def test_an_image_is_shuffled_among_its_neighbours(urls, tmp_path):
    one = TarShards(urls[:1])
    in_order = [raw.key.row for raw in one.read(0)]
    shuffled = [[raw.key.row for raw in one.read_shuffled(0, 4, seed)] for seed in ("a", "a", "b")]
    assert in_order == list(range(PER_SHARD)) and sorted(shuffled[0]) == in_order
    assert shuffled[0] == shuffled[1] != shuffled[2] and shuffled[0] != in_order
    assert [raw.key.row for raw in one.read_shuffled(0, 1, "a")] == in_order
    runs = [
        numbers(make_stream(urls[:1], tmp_path, lanes=1, num_samples=14, seed=seed, name=f"{seed}")) for seed in (1, 2)
    ]
    assert runs[0][:7] != runs[0][7:] and runs[0][:7] != runs[1][:7]


def test_samples_are_named_by_shard_and_place(urls, tmp_path):
    stream = make_stream(urls, tmp_path)
    for position in range(60):
        shard, row = divmod(number_of(stream[position]), 10)
        assert stream[position]["key"] == ImageKey(f"shard-{shard:06d}", row)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_sees_the_same_images_whatever_reads_them_and_wherever_it_resumes(urls, tmp_path, workers, processes):
    """Through the loaders that the Trainer makes and, for a resume, skips in."""
    expected = numbers(make_stream(urls, tmp_path, lanes=2, name="expected"))
    for skipped in (0, 5, 20):  # batches of each process; 20 of 2 processes are epochs later
        batches = []
        for rank in range(processes):
            stream = make_stream(urls, tmp_path, lanes=2, name=f"{skipped}")
            loader = prepare_data_loader(
                DataLoader(stream, batch_size=4, num_workers=workers, collate_fn=list),
                num_processes=processes,
                process_index=rank,
                put_on_device=False,
            )
            loader = skip_first_batches(loader, skipped) if skipped else loader
            batches.append([[number_of(sample) for sample in batch] for batch in loader])
        found = [number for step in zip(*batches, strict=True) for batch in step for number in batch]
        assert found == expected[skipped * processes * 4 :]


def test_a_resume_skips_known_shards_and_decodes_nothing_it_skips(urls, tmp_path, monkeypatch):
    stream = make_stream(urls, tmp_path)
    expected = numbers(stream)
    opened, decoded, read = [], [], TarShards.read
    monkeypatch.setattr(TarShards, "read", lambda self, number: opened.append(number) or read(self, number))
    from sf_mllm.data import image_sources

    decode = image_sources.open_image
    monkeypatch.setattr(image_sources, "open_image", lambda *args: decoded.append(args) or decode(*args))
    assert numbers(make_stream(urls, tmp_path), [190]) == expected[190:191]
    assert len(opened) == 1 and len(decoded) == 1
    opened.clear()
    assert numbers(make_stream(urls, tmp_path, name="without notes"), [190]) == expected[190:191]
    assert set(opened) == set(range(6)) and len(decoded) == 2  # each shard once to count its images


def test_positions_may_go_back(urls, tmp_path):
    stream = make_stream(urls, tmp_path)
    expected = numbers(stream)
    assert numbers(stream, [150, 3, 3, 99, 0]) == [expected[i] for i in (150, 3, 3, 99, 0)]
    assert numbers(pickle.loads(pickle.dumps(stream)), [5]) == expected[5:6]


@pytest.fixture
def broken(urls, tmp_path):
    """As `urls`, but images 12, 13 and 44 cannot be decoded and 20 is missing from its sample."""
    for shard, bad in ((1, (2, 3)), (4, (4,)), (2, (0,))):
        samples = [{"png": encode(10 * shard + i), "cls": b"3"} for i in range(PER_SHARD)]
        for i in bad:
            samples[i] = {"cls": b"3"} if shard == 2 else {"png": b"no image"}
        write_shard(tmp_path / f"{shard}.tar", samples)
    return urls


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_counted_once_and_the_next_one_takes_their_place(broken, tmp_path, caplog, workers):
    with caplog.at_level(logging.WARNING):
        stream = make_stream(broken, tmp_path, share=0.1, num_samples=84)
        found = read(DataLoader(stream, batch_size=4, num_workers=workers, collate_fn=list))
    assert len(stream.unreadable) == 4
    if not workers:
        assert caplog.text.count("4.tar, 00004") == 1 and "2.tar, 00000 is missing" in caplog.text
    assert set(EVERYTHING) - set(found) == {12, 13, 44, 20} and len(found) == 84
    again = make_stream(broken, tmp_path, share=0.1, num_samples=84)
    assert numbers(again, range(50, 84)) == found[50:] and len(again.unreadable) == 4


def test_too_many_bad_images_stop_the_run(broken, tmp_path):
    with pytest.raises(InputError, match=r"4 of \d+ images cannot be read, 3 are allowed; .*max_unreadable_share"):
        numbers(make_stream(broken, tmp_path, share=0.003))
    nothing = write_shard(tmp_path / "nothing.tar", [{"png": b"no image"}])
    with pytest.raises(InputError, match="1000 images in a row cannot be read"):
        numbers(make_stream([nothing], tmp_path, share=0.01, name="nothing"))


def test_damaged_shards_stop_the_run_by_name(urls, tmp_path):
    content = (tmp_path / "2.tar").read_bytes()
    (tmp_path / "2.tar").write_bytes(content[:4000])
    with pytest.raises(InputError, match=r"2.tar' cannot be read to its end \(unexpected end of data\); repair it"):
        list(TarShards(urls).read(2))
    (tmp_path / "2.tar").write_bytes(b"")
    with pytest.raises(InputError, match=r"2.tar' cannot be read to its end"):
        list(TarShards(urls).read(2))
    write_shard(tmp_path / "2.tar", [])
    with pytest.raises(InputError, match=r"2.tar' holds no sample"):
        list(TarShards(urls).read(2))
    with pytest.raises(InputError, match=r"gone.tar 2>/dev/null' cannot be read to its end"):
        list(TarShards([f"pipe:cat {tmp_path}/gone.tar 2>/dev/null"]).read(0))
    with pytest.raises(InputError, match=r"end \(the command that reads it ended with status 3\)"):
        list(TarShards([f"pipe:cat {tmp_path}/1.tar; exec >&-; sleep 0.2; exit 3"]).read(0))  # fails after its output


def test_a_shard_that_changes_during_a_run_is_noticed(urls, tmp_path):
    numbers(make_stream(urls, tmp_path))
    write_shard(tmp_path / "3.tar", [{"png": encode(30)}] * 5)
    with pytest.raises(InputError, match="shard-000003 holds 5 images now and 7 when this run read it first"):
        numbers(make_stream(urls, tmp_path))
    assert TarShards(urls).fingerprint != TarShards(urls[:5]).fingerprint


def test_a_fingerprint_knows_names_and_sizes_not_places(urls, tmp_path):
    before = TarShards(urls).fingerprint
    (tmp_path / "moved").mkdir()
    for s in range(6):
        (tmp_path / f"{s}.tar").rename(tmp_path / f"moved/{s}.tar")
    assert open_images([f"{tmp_path}/moved"]).fingerprint == before
    write_shard(tmp_path / "moved/3.tar", [{"png": encode(30)}] * 50)
    assert open_images([f"{tmp_path}/moved"]).fingerprint != before


def test_the_image_of_a_sample_is_found_or_asked_for(tmp_path):
    samples = [{"jpg": encode(200, "JPEG"), "seg.png": encode(7), "json": b"{}"}]
    url = write_shard(tmp_path / "a.tar", samples)
    with pytest.raises(InputError, match=r"a.tar, 00000 holds 2 images \(jpg, seg.png\); set data.image_column"):
        list(open_images([url]).read(0))
    for column, value in (("jpg", 200), (".jpg", 200), ("seg.png", 7)):
        (raw,) = open_images([url], column).read(0)
        assert np.array(raw.open()).mean() == value


def test_commands_are_read_and_may_be_left(urls, tmp_path):
    shards = TarShards([f"pipe:cat {url}" for url in urls])
    assert numbers(make_stream(shards.urls, tmp_path)) == numbers(make_stream(urls, tmp_path, name="files"))
    reader = shards.read(0)
    next(reader)
    reader.close()


def test_a_size_is_noted_once(urls, tmp_path):
    torch.manual_seed(0)
    stream = make_stream(urls, tmp_path)
    numbers(stream)
    assert stream.sizes.refresh() == {f"shard-{s:06d}": PER_SHARD for s in range(6)}
    assert len((tmp_path / "run" / "sizes.jsonl").read_text().splitlines()) == 6
