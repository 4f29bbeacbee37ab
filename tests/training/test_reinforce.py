import json
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import default_collate

from sf_mllm.config import load_run_config
from sf_mllm.data.images import HELD_OUT
from sf_mllm.data.teacher_store import TeacherStore
from sf_mllm.data.teacher_store_writer import StoreWriter
from sf_mllm.training.arguments import make_training_arguments
from sf_mllm.training.bootstrap import __main__ as bootstrap
from sf_mllm.training.bootstrap.config import BootstrapConfig
from sf_mllm.training.bootstrap.run import build_trainer, run_bootstrap
from sf_mllm.training.bootstrap.teachers import load_teacher
from sf_mllm.training.reinforce import __main__ as reinforce
from sf_mllm.training.reinforce import run as reinforce_run
from sf_mllm.training.reinforce.run import make_store
from sf_mllm.training.reinforce.store_origin import fingerprint_teacher
from sf_mllm.training.run_folder import RunFolder
from tests.training.killed_runs import run_until_killed_at_step_5
from tests.training.test_bootstrap import rows_of, weights_of

STORE = ("store.crops=3", "store.grid=2", "train.per_device_eval_batch_size=7", "train.dataloader_num_workers=0")


def read(run_file, *overrides):
    return load_run_config(BootstrapConfig, run_file, [*STORE, f"store.path={run_file.parent / 'store'}", *overrides])


def content_of(store):
    return {path.relative_to(store).as_posix(): path.read_bytes() for path in Path(store).rglob("*") if path.is_file()}


def assert_close_files(path, expected_path):
    """Two files of a group, whose crops stood at other places in the teacher's batches: last bits may differ."""
    found, expected = load_file(path), load_file(expected_path)
    for name in ("index", "crops"):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)
    torch.testing.assert_close(found["embedding"], expected["embedding"])
    assert (found["patches"].int() - expected["patches"].int()).abs().max() <= 1


def datasets_of(config):
    run = RunFolder.open(config, config.output_dir)
    trainer = build_trainer(config, run, make_training_arguments(config.train, run.checkpoints, config.seed))[0]
    return trainer, trainer.train_dataset, trainer.eval_dataset


@pytest.fixture
def small_groups(monkeypatch):
    """Four images a group, so that fourteen images make several."""
    for module in ("image_sources", "group_crops"):
        monkeypatch.setattr(f"sf_mllm.data.{module}.IMAGES_A_GROUP", 4)


@pytest.fixture
def shards(image_folder, tmp_path):
    """The same images in three tar shards, the last of which is held out."""
    import tarfile

    paths = sorted(path for path in image_folder.rglob("*.png"))
    for number, part in enumerate((paths[:5], paths[5:10], paths[10:])):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for path in part:
                tar.add(path, arcname=path.name)
    return f"{tmp_path}/*.tar"


def test_stored_targets_are_what_the_teacher_says_about_the_same_pixels(run_file, small_groups):
    """The first epochs of a run with a store show the crops of a run without; then they come again."""
    overrides = ("train.max_steps=11", "data.color_jitter=0.4")
    config = read(run_file, *overrides)
    make_store(config)
    trainer, stored, held_out = datasets_of(config)
    online = read(run_file, "store.path=null", f"output_dir={run_file.parent / 'b'}", *overrides)
    _, drawn, held_out_online = datasets_of(online)
    task = trainer.task
    for with_store, without in ((stored, drawn), (held_out, held_out_online)):
        samples = range(33 if with_store is stored else len(held_out))  # three epochs of 11 images
        batch = default_collate([with_store[i] for i in samples])
        expected_batch = default_collate([without[i] for i in samples])
        torch.testing.assert_close(batch["pixel_values"], expected_batch["pixel_values"], rtol=0, atol=0)
        found, expected = task.targets(batch), task.targets(expected_batch)
        assert F.cosine_similarity(found.embedding, expected.embedding).min() > 0.9999
        pooled = F.avg_pool2d(expected.feature_map, 2)  # of 4 x 4 patches
        assert found.feature_map.shape == pooled.shape
        error = (found.feature_map - pooled).norm(dim=1) / pooled.norm(dim=1)
        assert error.max() < 0.01
    key_order = [stored[i] for i in range(33, 44)]  # the fourth epoch: the first crop of each image again
    of_first_epoch = {stored[i]["pixel_values"].numpy().tobytes() for i in range(11)}
    assert {sample["pixel_values"].numpy().tobytes() for sample in key_order} == of_first_epoch


def test_a_grid_of_the_teacher_s_own_size_keeps_its_map(run_file):
    config = read(run_file, "store.grid=99", "train.max_steps=2")
    make_store(config)
    trainer, stored, _ = datasets_of(config)
    batch = default_collate([stored[i] for i in range(4)])
    found = trainer.task.targets(batch).feature_map
    exact = trainer.task.targets({"pixel_values": batch["pixel_values"]}).feature_map
    assert found.shape == exact.shape
    assert ((found - exact).norm(dim=1) / exact.norm(dim=1)).max() < 0.01


def test_the_number_of_workers_does_not_show_in_a_store(run_file, small_groups):
    alone, shared = (
        make_store(read(run_file, f"store.path={run_file.parent / name}", f"train.dataloader_num_workers={workers}"))
        for name, workers in (("a", 0), ("b", 2))
    )
    expected = content_of(alone)
    assert sorted(expected) == [
        "groups/000000.safetensors", "groups/000001.safetensors", "groups/000002.safetensors",
        "groups/000003.safetensors", "held-out.safetensors", "store.json",
    ]  # fmt: skip
    assert {name: len(content) for name, content in content_of(shared).items()} == {
        name: len(content) for name, content in expected.items()
    }
    for name in expected:
        if name.endswith(".safetensors"):
            assert_close_files(shared / name, alone / name)


def test_a_run_with_a_store_never_asks_the_teacher_and_learns(run_file, monkeypatch, caplog):
    overrides = ("train.max_steps=60", "train.logging_steps=5", "data.min_crop_area=0.9", "data.flip=false")
    config = read(run_file, *overrides)
    make_store(config)
    for method in ("forward", "to", "compile"):  # it does not even leave the CPU
        monkeypatch.setattr(f"sf_mllm.training.bootstrap.teachers.OpenClipTeacher.{method}", None)
    # Another seed of the run starts from other weights; the store belongs to the seed of the data.
    assert bootstrap.main([str(run_file), *STORE, f"store.path={config.store.path}", *overrides, "seed=1"]) == 0
    assert "The teacher's outputs come from" in caplog.text
    record = json.loads((Path(config.output_dir) / "run.json").read_text())
    assert (record["store"]["images"], record["store"]["grid"]) == (14, 2)
    rows = rows_of(config.output_dir)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.6 * losses[0]
    cosines = [row["eval_embedding_cosine"] for row in rows if "eval_embedding_cosine" in row]
    assert cosines[-1] > cosines[0]


def test_a_killed_run_with_store_and_workers_resumes_and_ends_with_the_same_weights(run_file):
    make_store(read(run_file))
    undisturbed = weights_of(run_bootstrap(read(run_file, f"output_dir={run_file.parent / 'a'}")))
    overrides = [f"output_dir={run_file.parent / 'b'}", "train.dataloader_num_workers=2"]
    command = [str(run_file), *STORE, f"store.path={run_file.parent / 'store'}", *overrides]
    assert run_until_killed_at_step_5(*command) == -signal.SIGKILL
    torch.testing.assert_close(weights_of(run_bootstrap(read(run_file, *overrides))), undisturbed, rtol=0, atol=0)
    starts = json.loads((run_file.parent / "b" / "run.json").read_text())["starts"]
    assert [start["resumed_from"] for start in starts] == [None, "checkpoint-3"]


def test_an_interrupted_store_goes_on_at_the_next_group(run_file, small_groups, monkeypatch):
    whole = content_of(make_store(read(run_file, f"store.path={run_file.parent / 'whole'}")))
    config = read(run_file)
    write = StoreWriter.write_group
    written = []

    def fail_at_the_third_group(self, group, *arguments, **options):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(group)
        return write(self, group, *arguments, **options)

    monkeypatch.setattr(StoreWriter, "write_group", fail_at_the_third_group)
    with pytest.raises(KeyboardInterrupt):
        make_store(config)
    assert written == [HELD_OUT, "000000"]
    with pytest.raises(ValueError, match=r"is not complete \(2 of 5 groups\)"):
        run_bootstrap(config)

    def note(self, group, *arguments, **options):
        written.append(group)
        return write(self, group, *arguments, **options)

    monkeypatch.setattr(StoreWriter, "write_group", note)
    make_store(config)
    assert written == [HELD_OUT, "000000", "000001", "000002", "000003"]
    assert content_of(config.store.path).keys() == whole.keys()
    for name in whole:
        if name.endswith(".safetensors"):
            assert_close_files(Path(config.store.path) / name, run_file.parent / "whole" / name)
    finished = content_of(config.store.path)
    make_store(config)  # the same command again leaves it as it is
    assert len(written) == 5 and content_of(config.store.path) == finished


def test_tar_shards_are_groups(run_file, shards):
    config = read(run_file, f"data.images={shards}", "data.held_out=4")
    store = TeacherStore.open(make_store(config))
    assert list(store.description["groups"]) == [HELD_OUT, "shard-000000", "shard-000001"]
    content = store.description["content"]
    assert (content["images"], content["crops"]) == (14, 10 * 3 + 4)
    run_bootstrap(config)
    assert [row["step"] for row in rows_of(config.output_dir) if "loss" in row] == [2, 4, 6, 8]


def test_images_that_cannot_be_read_are_counted_and_bounded(run_file, tmp_path, capfd, caplog):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(30):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{index:02d}.png")
    (folder / "07.png").write_bytes(b"no image")
    overrides = [f"data.images={folder}", "data.held_out=3", "data.max_unreadable_share=0.05"]
    config = read(run_file, *overrides)
    make_store(config)
    assert "Left out an image that cannot be read" in caplog.text and "07.png" in caplog.text
    content = json.loads((Path(config.store.path) / "store.json").read_text())["content"]
    assert (content["images"], content["unreadable_images"]) == (29, 1)
    run_bootstrap(config)  # another image stands in for it, as without a store
    assert json.loads((Path(config.output_dir) / "run.json").read_text())["unreadable_images"] == 1

    shutil.rmtree(config.store.path)
    command = [str(run_file), *STORE, f"store.path={config.store.path}", *overrides, "train.dataloader_num_workers=2"]
    assert reinforce.main([*command, "data.max_unreadable_share=0.02"]) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: 1 of 30 images cannot be read, 0 are allowed")


def test_a_group_that_cannot_be_read_leaves_the_others_usable(run_file, small_groups, tmp_path, image_folder):
    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    for path in sorted(path for path in folder.rglob("*.png"))[4:8]:
        path.write_bytes(b"no image")
    config = read(run_file, f"data.images={folder}", "data.max_unreadable_share=0.4")
    store = TeacherStore.open(make_store(config))
    content = store.description["content"]
    assert (content["images"], content["unreadable_images"]) == (10, 4)
    assert load_file(store.directory / store.description["groups"]["000001"])["patches"].shape == (0, 3, 2, 2, 32)
    run_bootstrap(config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.resolution=48", "data.resolution was 40, is 48"),
        ("data.min_crop_area=0.5", "data.min_crop_area was 0.4, is 0.5"),
        ("data.max_aspect_ratio=1.5", "data.max_aspect_ratio was 1.333"),
        ("data.flip=false", "data.flip was True, is False"),
        ("data.color_jitter=0.1", "data.color_jitter was 0.0, is 0.1"),
        ("data.held_out=4", "data.held_out was 3, is 4"),
        ("data.resolutions=[32]", "data.resolutions was [[40, 40]], is [[32, 32]]"),
        ("data.seed=1", "data.seed was 0, is 1"),
        ("data.resolutions=[32,40]", "data.resolutions lists 2 sizes"),
        ("store.path=nowhere", "There is no teacher store in 'nowhere'; make it with python -m"),
    ],
)
def test_a_run_refuses_a_store_that_does_not_fit(run_file, override, message, capfd):
    config = read(run_file)
    make_store(config)
    arguments = [str(run_file), *STORE, f"store.path={config.store.path}", override]
    assert bootstrap.main(arguments) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_a_run_refuses_a_store_of_another_teacher_preprocessing_or_images(run_file, clip_directory, tmp_path):
    config = read(run_file)
    make_store(config)
    for name in ("weights", "preprocessing", "images"):
        shutil.copytree(clip_directory, tmp_path / name)
    weights = load_file(tmp_path / "weights" / "open_clip_model.safetensors")
    weights["visual.proj"][0, 0] += 1e-3
    from safetensors.torch import save_file

    save_file(weights, tmp_path / "weights" / "open_clip_model.safetensors")
    settings = json.loads((tmp_path / "preprocessing" / "open_clip_config.json").read_text())
    settings["preprocess_cfg"]["mean"][0] = 0.45
    (tmp_path / "preprocessing" / "open_clip_config.json").write_text(json.dumps(settings))
    folder = tmp_path / "other images"
    shutil.copytree(config.data.images, folder)
    (folder / "3.png").rename(folder / "33.png")
    for override, message in (
        (
            f"teacher.model=local-dir:{tmp_path / 'weights'}",
            r"belongs to another run: the teacher's weights was \w+, is",
        ),
        (
            f"teacher.model=local-dir:{tmp_path / 'preprocessing'}",
            r"preprocessing was 32 px, mean 0.4, 0.5, 0.6.* is 32",
        ),
        (f"data.images={folder}", r"another run: the images was \w+, is"),
    ):
        with pytest.raises(ValueError, match=message):
            run_bootstrap(read(run_file, override))


def test_a_copy_of_a_teacher_has_its_fingerprint_and_one_of_another_activation_has_not(
    run_file, clip_directory, tmp_path
):
    shutil.copytree(clip_directory, tmp_path / "copy")
    original = fingerprint_teacher(load_teacher(read(run_file).teacher))
    copied = read(run_file, f"teacher.model=local-dir:{tmp_path / 'copy'}").teacher
    assert fingerprint_teacher(load_teacher(copied)) == original
    path = tmp_path / "copy" / "open_clip_config.json"
    settings = json.loads(path.read_text())
    settings["model_cfg"]["quick_gelu"] = True
    path.write_text(json.dumps(settings))
    assert fingerprint_teacher(load_teacher(copied)) != original


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("store.path=null", "store.path is not set"),
        ("store.path=/proc/store", "The teacher store '/proc/store' cannot be made: "),
        ("store.crops=0", "store.crops must be at least 1, got 0"),
        ("store.grid=0", "store.grid must be at least 1, got 0"),
        ("store.crop=2", "Did you mean 'crops'"),
        ("--fast", "Unrecognized arguments: --fast"),
    ],
)
def test_bad_settings_end_with_one_line(run_file, override, message, capfd):
    assert reinforce.main([str(run_file), *STORE, f"store.path={run_file.parent / 'store'}", override]) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_two_processes_share_the_groups(run_file, small_groups, monkeypatch):
    """One after the other here: the first leaves the second's groups, which then completes the store."""
    config = read(run_file)
    whole = content_of(make_store(read(run_file, f"store.path={run_file.parent / 'whole'}")))
    make_arguments = reinforce_run.make_training_arguments
    for rank in range(2):

        def arguments_of_a_process(*arguments, rank=rank):
            made = make_arguments(*arguments)
            monkeypatch.setattr(type(made), "process_index", rank)
            monkeypatch.setattr(type(made), "world_size", 2)
            monkeypatch.setattr(type(made), "main_process_first", lambda self, **options: nullcontext())
            return made

        monkeypatch.setattr(reinforce_run, "make_training_arguments", arguments_of_a_process)
        make_store(config)
        files = "files" in json.loads((Path(config.store.path) / "store.json").read_text())
        assert files == (rank == 1)
    assert content_of(config.store.path).keys() == whole.keys()
    for name in whole:
        if name.endswith(".safetensors"):
            assert_close_files(Path(config.store.path) / name, run_file.parent / "whole" / name)
