import io
import os
import subprocess

import datasets
import numpy as np
import pytest
from PIL import Image

from sf_mllm.data.image_sources import FolderImages, JoinedImages, TableImages, find_images
from sf_mllm.data.image_specs import open_images
from sf_mllm.data.tar_shards import TarShards
from sf_mllm.errors import InputError


def encode(level, mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, (6, 4), level if mode == "L" else (level,) * len(mode)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def table():
    rows = {"image": [{"bytes": encode(i), "path": f"{i}.png"} for i in range(5)], "label": list(range(5))}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def levels(source):
    return [int(np.array(source.open(i)).mean()) for i in range(len(source))]


def test_images_are_found_in_subfolders_in_a_fixed_order(tmp_path):
    for name in ("b.JPG", "a.png", "sub/deep/c.webp", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a folder.png").mkdir()
    paths = find_images(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == ["a.png", "b.JPG", "sub/deep/c.webp"]
    source = open_images([str(tmp_path)])
    assert isinstance(source, FolderImages) and [source.name(i) for i in range(3)] == [str(path) for path in paths]


def test_a_fingerprint_of_a_folder_knows_names_not_places(tmp_path):
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "ä.png").write_bytes(b"")
    first, second = (FolderImages(tmp_path / place) for place in ("one", "two"))
    assert first.fingerprint == second.fingerprint
    (tmp_path / "two" / "b.png").write_bytes(b"")
    assert FolderImages(tmp_path / "two").fingerprint != first.fingerprint


@pytest.mark.parametrize("form", ["file", "folder", "glob", "plain"])
def test_parquet(tmp_path, table, form):
    folder = tmp_path / "tables"
    folder.mkdir()
    if form == "plain":  # written without the features of datasets: a struct of bytes and path
        table = datasets.Dataset(table.data.table.replace_schema_metadata())
    table.to_parquet(folder / "a.parquet")
    table.select([4, 0]).to_parquet(folder / "b.parquet")
    spec = {"file": "a.parquet", "plain": "a.parquet", "glob": "*.parquet", "folder": ""}[form]
    source = open_images([str(folder / spec)])
    assert isinstance(source, TableImages) and source.column == "image"
    assert levels(source) == ([0, 1, 2, 3, 4, 4, 0] if form in ("glob", "folder") else [0, 1, 2, 3, 4])
    assert source.name(3).endswith("row 3")


def test_a_saved_data_set_and_its_arrow_files(tmp_path, table):
    table.save_to_disk(tmp_path / "saved", num_shards=2)
    saved = open_images([str(tmp_path / "saved")])
    assert levels(saved) == [0, 1, 2, 3, 4]
    (tmp_path / "saved").rename(tmp_path / "moved")
    assert open_images([str(tmp_path / "moved")]).fingerprint == saved.fingerprint
    files = open_images([str(tmp_path / "moved" / "*.arrow")])
    assert levels(files) == [0, 1, 2, 3, 4]
    assert not (tmp_path / "cache").exists()  # mapped where they lie
    datasets.DatasetDict(train=table, test=table).save_to_disk(tmp_path / "splits")
    with pytest.raises(InputError, match=r"several splits.*splits/train"):
        open_images([str(tmp_path / "splits")])
    assert levels(open_images([str(tmp_path / "splits/train")])) == [0, 1, 2, 3, 4]


def test_undecodable_rows_are_named(tmp_path):
    rows = {"image": [{"bytes": b"no image", "path": None}, {"bytes": None, "path": None}]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(tmp_path / "a.parquet")
    source = open_images([str(tmp_path / "a.parquet")])
    with pytest.raises(InputError, match=r"a.parquet, row 0 is not an image"):
        source.open(0)
    with pytest.raises(InputError, match=r"a.parquet, row 1 is missing: column 'image' is empty"):
        source.open(1)


def test_the_column_of_images_is_found_or_asked_for(tmp_path, table):
    two = table.add_column("mask", table["label"]).map(lambda row: {"mask": row["image"]})
    two = two.cast_column("mask", datasets.Image())
    two.to_parquet(tmp_path / "two.parquet")
    spec = [str(tmp_path / "two.parquet")]
    with pytest.raises(InputError, match="2 columns of images"):
        open_images(spec)
    assert open_images(spec, "mask").column == "mask"
    with pytest.raises(InputError, match=r"has no column 'imag'.*Did you mean 'image'"):
        open_images(spec, "imag")
    with pytest.raises(InputError, match="has no column of images"):
        open_images(spec, "label")
    table.select_columns("label").to_parquet(tmp_path / "none.parquet")
    with pytest.raises(InputError, match=r"has no column of images; set data.image_column to one of: label"):
        open_images([str(tmp_path / "none.parquet")])
    raw = datasets.Dataset.from_dict({"jpg": [encode(3), encode(9)], "id": [0, 1]})
    raw.to_parquet(tmp_path / "raw.parquet")
    assert levels(open_images([str(tmp_path / "raw.parquet")])) == [3, 9]


def test_several_sources_are_joined(tmp_path, table):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.png").write_bytes(encode(77))
    table.to_parquet(tmp_path / "a.parquet")
    source = open_images([str(tmp_path / "a.parquet"), str(tmp_path / "folder"), str(tmp_path / "a.parquet")])
    assert isinstance(source, JoinedImages)
    assert levels(source) == [0, 1, 2, 3, 4, 77, 0, 1, 2, 3, 4]
    assert source.name(5).endswith("a.png") and source.name(6).endswith("a.parquet, row 0")


def test_16_bit_and_transparent_images_pass_through_the_same_decoder(tmp_path):
    deep = io.BytesIO()
    Image.fromarray(np.full((4, 6), 0x8080, np.uint16)).save(deep, "PNG")
    rows = {"image": [{"bytes": content, "path": None} for content in (deep.getvalue(), encode(0, "RGBA"))]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")
    assert levels(open_images([str(tmp_path / "a.parquet")])) == [128, 255]


@pytest.mark.parametrize(
    ("files", "spec", "message"),
    [
        ([], "missing", r"'.*missing' does not exist; data.images takes a folder of images, tar shards"),
        ([], "*.tar", r"'.*\*.tar' does not exist"),
        (["notes.txt"], "", "holds neither images nor files of images"),
        (["a.tar", "b.parquet"], "", "holds parquet and tar files"),
        (["a.tar", "b.parquet"], "*", "not all tar, all parquet or all arrow files"),
        (["a.jpg"], "a.jpg", "not all tar, all parquet or all arrow files"),
        (["a.tar"], "{a,b}.tar", r"Tar shard '.*b.tar' does not exist \(1 of 2 are missing\)"),
        (["a.parquet"], "a.parquet", r"a.parquet' cannot be read as parquet by datasets"),
        (["a.arrow"], "a.arrow", r"a.arrow' cannot be read as arrow by datasets"),
    ],
)
def test_what_means_nothing_gets_one_sentence(tmp_path, files, spec, message):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in files:
        (folder / name).write_bytes(b"no such file format")
    with pytest.raises(InputError, match=message) as caught:
        open_images([f"{folder}/{spec}".rstrip("/")])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "must be one or several of"),
        ([3], "must be one or several of"),
        (["hf:mnist"], "not of the form hf:OWNER/NAME"),
        (["hf:nobody/nothing:train"], "'hf:nobody/nothing:train' cannot be loaded by datasets"),
        (["s3://bucket/a.tar"], r"webdataset does not open 's3://bucket/a.tar'.*pipe:COMMAND"),
    ],
)
def test_descriptions_that_cannot_be_used_get_one_sentence(specs, message):
    with pytest.raises(InputError, match=message) as caught:
        open_images(specs)
    assert "\n" not in str(caught.value)


def test_a_hub_name_and_its_split_reach_datasets(monkeypatch, table):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: asked.append((args, options)) or table)
    assert levels(open_images(["hf:owner/name"])) == [0, 1, 2, 3, 4]
    open_images(["hf:owner/name:validation[:10%]"])
    assert asked == [(("owner/name",), {"split": "train"}), (("owner/name",), {"split": "validation[:10%]"})]


def test_shards_of_every_form(tmp_path, monkeypatch):
    for name in ("000", "001", "002"):
        subprocess.run(["tar", "cf", tmp_path / f"{name}.tar", "-C", "/", "dev/null"], check=True)
    paths = [str(tmp_path / f"{name}.tar") for name in ("000", "001", "002")]
    for spec in ("{000..002}.tar", "*.tar", ""):
        shards = open_images([f"{tmp_path}/{spec}".rstrip("/")])
        assert isinstance(shards, TarShards) and shards.urls == paths
    assert open_images([paths[2], paths[0]]).urls == [paths[2], paths[0]]
    assert open_images(["https://a.b/{00..01}.tar"]).urls == ["https://a.b/00.tar", "https://a.b/01.tar"]
    assert open_images(["pipe:cat {a,b}.tar | cat"]).urls == ["pipe:cat a.tar | cat", "pipe:cat b.tar | cat"]
    with pytest.raises(InputError, match="mixes tar shards with other forms"):
        os.mkdir(tmp_path / "images")
        (tmp_path / "images/a.png").write_bytes(b"")
        open_images([paths[0], str(tmp_path / "images")])
