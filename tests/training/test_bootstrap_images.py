import io
import json
import multiprocessing
import os
import signal
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from safetensors.torch import load_file

from sf_mllm.config import load_run_config
from sf_mllm.data.augment import CropSettings
from sf_mllm.data.image_sources import ImagesInMemory
from sf_mllm.data.image_streams import StreamedImages
from sf_mllm.errors import InputError
from sf_mllm.training.arguments import make_training_arguments
from sf_mllm.training.bootstrap.__main__ import main
from sf_mllm.training.bootstrap.config import BootstrapConfig, DataConfig
from sf_mllm.training.bootstrap.images import crop_settings, find_run_images, loader_defaults, make_datasets
from sf_mllm.training.bootstrap.run import run_bootstrap
from sf_mllm.training.run_folder import RunFolder
from tests.training.killed_runs import run_until_killed_at_step_5


def encode(value):
    """An image with some structure whose mean is about its number."""
    pixels = np.random.default_rng(value).integers(-value, value + 1, (12, 10, 3)) + value
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).resize((40, 48)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path):
    """Five shards of six images; image i of shard s is number 10 s + i."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for s in range(5):
        with webdataset.TarWriter(str(folder / f"{s}.tar"), encoder=False) as writer:
            for i in range(6):
                writer.write({"__key__": f"{i}", "png": encode(10 * s + i)})
    return folder


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = {"image": [{"bytes": encode(i), "path": f"{i}.png"} for i in range(20)]}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "images.parquet")
    return tmp_path / "images.parquet"


def read(run_file, *overrides):
    return load_run_config(BootstrapConfig, run_file, overrides)


def record_of(config):
    return json.loads((Path(config.output_dir) / "run.json").read_text())


def find(run_file, *overrides):
    return find_run_images(read(run_file, *overrides), run_file.parent / "scenes")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_on_shards_resumes_and_ends_with_the_same_weights(run_file, shards, workers):
    """8 steps of 4 images over 24, a bad one among them; killed after step 5 and resumed from 3."""
    with webdataset.TarWriter(str(shards / "1.tar"), encoder=False) as writer:
        for i in range(6):
            writer.write({"__key__": f"{i}", "png": b"no image" if i == 2 else encode(10 + i)})
    overrides = [f"data.images={shards}/{{0..4}}.tar", "data.held_out=3", f"train.dataloader_num_workers={workers}"]
    overrides += ["data.max_unreadable_share=0.1", "data.shuffle_buffer=3"]
    config = read(run_file, f"output_dir={run_file.parent / 'a'}", *overrides)
    undisturbed = load_file(run_bootstrap(config) / "model.safetensors")
    assert record_of(config)["data"]["images"] == "5 tar shards" and record_of(config)["unreadable_images"] == 1
    assert multiprocessing.active_children() == []
    overrides.append(f"output_dir={run_file.parent / 'b'}")
    assert run_until_killed_at_step_5(str(run_file), *overrides) == -signal.SIGKILL
    config = read(run_file, *overrides)
    resumed = load_file(run_bootstrap(config) / "model.safetensors")
    torch.testing.assert_close(resumed, undisturbed, rtol=0, atol=0)
    record = record_of(config)
    assert [start["resumed_from"] for start in record["starts"]] == [None, "checkpoint-3"]
    assert record["unreadable_images"] == 1 and record["shard_readers"] == max(1, workers)


def test_one_percent_of_bad_files_is_counted(run_file, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(200):
        (folder / f"{number:03d}.png").write_bytes(b"no image" if number in (20, 150) else encode(number))
    overrides = [f"data.images={folder}", "train.max_steps=50", "train.save_steps=50", "train.eval_strategy=no"]
    config = read(run_file, *overrides, "train.dataloader_num_workers=2", "data.resolution=16")
    run_bootstrap(config)
    assert record_of(config)["unreadable_images"] == 2
    lines = (Path(config.output_dir) / "unreadable_images.jsonl").read_text().splitlines()
    assert sorted(Path(json.loads(line)["image"]).name for line in lines) == ["020.png", "150.png"]
    (folder / "151.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="3 of 200 images cannot be read, 2 are allowed"):
        run_bootstrap(read(run_file, *overrides, f"output_dir={tmp_path / 'other'}", "data.resolution=16"))


def test_a_run_on_a_table_measured_on_a_folder_with_crops_of_several_sizes(run_file, parquet, image_folder):
    config = read(
        run_file,
        f"data.images=[{parquet}]",
        f"data.held_out_images={image_folder}",
        "data.resolutions=[40, [32, 64]]",
        "data.color_jitter=0.3",
        "train.max_steps=4",
    )
    run_bootstrap(config)
    assert record_of(config)["outcome"] == "complete" and record_of(config)["epochs"] == round(4 * 4 / 20, 2)


def test_images_are_split_by_the_seed_of_the_data(run_file, parquet):
    images = find(run_file, f"data.images={parquet}")
    assert len(images.training) == 17 and images.num_images == 20 and images.held_out_source is images.source
    assert sorted([*images.training, *images.held_out]) == list(range(20))
    other = find(run_file, f"data.images={parquet}", "data.seed=1")
    assert list(other.held_out) != list(images.held_out) and other.fingerprint == images.fingerprint
    assert list(find(run_file, f"data.images={parquet}", "seed=1").held_out) == list(images.held_out)


def test_the_last_shard_is_held_out(run_file, shards):
    images = find(run_file, f"data.images={shards}")
    assert list(images.training) == [0, 1, 2, 3] and len(images.held_out) == 3
    assert isinstance(images.held_out_source, ImagesInMemory)
    assert [raw.key for raw in images.held_out_source.images] == [("shard-000004", row) for row in range(3)]
    assert len(find(run_file, f"data.images={shards}", "data.held_out=100").held_out) == 6


def test_held_out_images_may_come_from_elsewhere(run_file, shards, parquet, image_folder):
    images = find(run_file, f"data.images={shards}", f"data.held_out_images={parquet}")
    assert len(images.training) == 5 and len(images.held_out_source) == 20 and len(set(images.held_out)) == 3
    images = find(run_file, f"data.images={image_folder}", f"data.held_out_images={shards}", "data.held_out=9")
    assert len(images.training) == 14 and len(images.held_out) == 9
    assert images.held_out_source.images[8].key == ("shard-000001", 2)
    assert find(run_file, f"data.images={image_folder}").fingerprint != images.fingerprint


def test_scenes_mix_with_others(run_file, image_folder):
    config = read(run_file, f"data.images=[scenes, {image_folder}]", "data.scenes_count=4")
    images = find_run_images(config, run_file.parent / "scenes")
    assert len(images.source) == 18


def test_scenes_of_the_domain_that_is_asked_for(run_file):
    config = read(run_file, "data.images=scenes", "data.scenes_count=4", "data.scenes_domain=clutter")
    folder = run_file.parent / "clutter"
    assert len(find_run_images(config, folder).source) == 4
    assert json.loads((folder / "scenes.json").read_text())["domain"] == "clutter"
    with pytest.raises(InputError, match="Scene domain 'photos' is unknown; choose one of: plain, clutter"):
        find_run_images(read(run_file, "data.images=scenes", "data.scenes_domain=photos"), run_file.parent / "photos")


def test_shards_are_dealt_to_the_readers_of_the_first_start(run_file, shards, caplog):
    config = read(run_file, f"data.images={shards}", f"data.held_out_images={shards}/4.tar")
    run = RunFolder.open(config, config.output_dir)
    found = []
    for workers in (2, 0, 4, 3):
        train = config.train | {"dataloader_num_workers": workers}
        arguments = make_training_arguments(train, run.checkpoints, config.seed)
        training, held_out = make_datasets(find_run_images(config, run.path), config, run, arguments)
        assert isinstance(training, StreamedImages) and training.num_lanes == 2
        found.append(torch.stack([training[position]["pixel_values"] for position in range(32)]))
        torch.testing.assert_close(found[-1], found[0], rtol=0, atol=0)
    assert len(held_out) == 3
    assert caplog.text.count("dealt to 2 readers (processes x workers) and there are 4 now") == 1
    assert caplog.text.count("and there are 3 now") == 1


def test_more_readers_than_shards_are_mentioned(run_file, shards, caplog):
    config = read(run_file, f"data.images={shards}")
    run = RunFolder.open(config, config.output_dir)
    arguments = make_training_arguments(config.train | {"dataloader_num_workers": 5}, run.checkpoints, config.seed)
    make_datasets(find_run_images(config, run.path), config, run, arguments)
    assert "4 tar shards are fewer than the 5 readers" in caplog.text


def test_settings_of_the_crops():
    data = DataConfig(images="a", resolution=96, min_crop_area=0.2, flip=False, color_jitter=0.5, max_aspect_ratio=2.0)
    assert crop_settings(data) == CropSettings(0.2, 2.0, False, 0.5, ((96, 96),))
    data.resolutions = [[64, 96], 32]
    assert crop_settings(data).resolutions == ((64, 96), (32, 32))


def test_workers_by_default(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(24), raising=False)
    assert loader_defaults({"max_steps": 3}) == {"max_steps": 3, "dataloader_num_workers": 8}
    assert loader_defaults({"dataloader_num_workers": 0}) == {"dataloader_num_workers": 0}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert loader_defaults({})["dataloader_num_workers"] == 5
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "24")
    assert loader_defaults({})["dataloader_num_workers"] == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.images={shards}/0.tar"], "is one tar shard and the last one is held out; give two or more"),
        (["data.images=[{shards}, {folder}]"], "data.images mixes tar shards with other forms"),
        (["data.images={shards}", "train.max_steps=-1", "train.num_train_epochs=2"], "set train.max_steps"),
        (["data.images={folder}", "data.held_out_images={folder}"], "data.held_out_images are the training images"),
        (["data.images={folder}", "data.held_out_images=scenes"], "data.held_out_images cannot be 'scenes'"),
        (["data.images={folder}", "data.images={shards}"], "data.images is given 2 times; put a range into quotes"),
        (["data.images={folder}", "data.resolutions=[4]"], "data.resolutions must list sides"),
        (["data.images={folder}", "data.max_aspect_ratio=0.9"], "data.max_aspect_ratio must be at least 1"),
        (["data.images={folder}", "data.color_jitter=2"], "data.color_jitter must be from 0 to 1"),
        (["data.images={folder}", "train.dataloader_persistent_workers=true"], "cannot be set for a bootstrap run"),
        (["data.images=7"], "data.images must be one or several of: a folder of images"),
    ],
)
def test_bad_settings_end_with_one_line(run_file, shards, image_folder, overrides, message, capfd):
    filled = [override.format(shards=shards, folder=image_folder) for override in overrides]
    assert main([str(run_file), *filled]) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
