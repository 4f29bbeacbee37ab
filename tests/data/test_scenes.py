import dataclasses
import json
import math
import subprocess
import sys

import pytest
import torch
from PIL import Image

from sf_mllm.data.scenes import export
from sf_mllm.data.scenes.__main__ import main
from sf_mllm.data.scenes.domains import COLORS, MAX_OBJECTS, SHAPES, SIZES, UNIT
from sf_mllm.data.scenes.draws import Draws
from sf_mllm.data.scenes.export import export_scenes
from sf_mllm.data.scenes.render import render
from sf_mllm.data.scenes.sampling import Scenes, ScenesConfig, concatenate, sample_scenes, tensor_fields
from sf_mllm.errors import InputError


def assert_same(first: Scenes, second: Scenes) -> None:
    assert first.domain == second.domain
    for name, values in tensor_fields(first).items():
        torch.testing.assert_close(values, getattr(second, name), rtol=0, atol=0)


def test_scene_depends_on_seed_and_index_only():
    config = ScenesConfig(seed=7)
    together = sample_scenes(torch.arange(40), config)
    assert_same(together.select(torch.tensor([31, 2, 17])), sample_scenes(torch.tensor([31, 2, 17]), config))
    assert_same(together, concatenate((together.select(slice(0, 9)), together.select(slice(9, 40)))))
    other = sample_scenes(torch.arange(40), ScenesConfig(seed=8))
    assert ((together.x != other.x) | ~together.present).float().mean() > 0.5


def test_scenes_stay_what_they_are():
    # Exports and reported scores refer to scenes by seed and index: a change here needs a new FORMAT_VERSION.
    scenes = sample_scenes(torch.arange(3), ScenesConfig(seed=3))
    assert scenes.count.tolist() == [8, 5, 2]
    assert scenes.color[2, :2].tolist() == [COLORS.index("yellow"), COLORS.index("pink")]
    assert scenes.shape[2, :2].tolist() == [SHAPES.index("ring"), SHAPES.index("square")]


def test_numbers_do_not_depend_on_request_sizes():
    indices = torch.tensor([0, 5, 2**32 - 1])
    at_once = Draws(11, indices).words(700)
    draws = Draws(11, indices)
    in_parts = torch.cat([draws.words(count) for count in (3, 250, 1, 300, 146)], dim=1)
    torch.testing.assert_close(in_parts, at_once, rtol=0, atol=0)
    assert at_once.min() >= 0 and at_once.max() < 2**32
    assert len(at_once.unique()) == at_once.numel()
    bits = (at_once[..., None] >> torch.arange(32)) & 1
    assert (bits.double().mean(dim=(0, 1)) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(at_once.numel())


def test_objects_keep_apart_and_inside_one_place():
    scenes = sample_scenes(torch.arange(600), ScenesConfig(seed=1))
    pair = scenes.present[:, :, None] & scenes.present[:, None] & ~torch.eye(MAX_OBJECTS, dtype=torch.bool)
    distance = (
        (scenes.x[:, :, None] - scenes.x[:, None]) ** 2 + (scenes.y[:, :, None] - scenes.y[:, None]) ** 2
    ).sqrt()
    assert (distance - scenes.radius[:, :, None] - scenes.radius[:, None])[pair].min() > 0.009 * UNIT
    for centre in (scenes.x, scenes.y):
        edge = torch.minimum(centre, UNIT - centre) - scenes.radius
        assert edge[scenes.present].min() > 0
        border = torch.minimum((centre - UNIT // 3).abs(), (centre - 2 * UNIT // 3).abs())
        assert border[scenes.present].min() > 0.014 * UNIT
    assert (scenes.color[~scenes.present] == -1).all() and (scenes.place[~scenes.present] == -1).all()


def test_attributes_are_balanced():
    scenes = sample_scenes(torch.arange(4000), ScenesConfig(seed=2, min_objects=3))
    counts = torch.bincount(scenes.count, minlength=9)
    assert counts[:3].sum() == 0
    assert (counts[3:] / len(scenes) * 6 - 1).abs().max() < 0.15
    for name, values in (("color", COLORS), ("shape", SHAPES), ("size", SIZES)):
        share = torch.bincount(getattr(scenes, name)[scenes.present]) / scenes.present.sum()
        assert share.shape == (len(values),)
        assert (share * len(values) - 1).abs().max() < 0.15, name


def one_object(shape: str, angle: int = 0) -> Scenes:
    scene = sample_scenes(torch.arange(1), ScenesConfig(seed=5, max_objects=1))
    first = torch.arange(MAX_OBJECTS)[None] == 0
    return dataclasses.replace(
        scene,
        shape=torch.where(first, SHAPES.index(shape), -1),
        color=torch.where(first, COLORS.index("red"), -1),
        tint=torch.zeros_like(scene.tint),
        x=torch.where(first, UNIT // 2, 0),
        y=torch.where(first, UNIT // 2, 0),
        radius=torch.where(first, 500, 1),
        angle=torch.full_like(scene.angle, angle),
        background=torch.zeros_like(scene.background),
        background_rgb=torch.zeros_like(scene.background_rgb),
    )


def lens_area(r1: float, r2: float, d: float) -> float:
    a1 = math.acos((d * d + r1 * r1 - r2 * r2) / (2 * d * r1))
    a2 = math.acos((d * d + r2 * r2 - r1 * r1) / (2 * d * r2))
    return r1 * r1 * (a1 - math.sin(2 * a1) / 2) + r2 * r2 * (a2 - math.sin(2 * a2) / 2)


AREAS = {  # in units of the squared bounding radius
    "circle": math.pi * 0.9**2,
    "square": 1.4**2,
    "triangle": 3 * math.sqrt(3) * 0.49**2,
    "star": 5 * 0.98 * 0.42 * math.sin(math.pi / 5),
    "cross": 4 * 2 * 0.94 * 0.3 - (2 * 0.3) ** 2,
    "ring": math.pi * (0.96**2 - 0.52**2),
    "heart": (4 + math.pi) * 0.53**2,
    "moon": math.pi * 0.96**2 - lens_area(0.96, 0.78, 0.46),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("angle", [0, 700])
def test_shape_has_its_area_and_stays_in_its_circle(shape, angle):
    image = render(one_object(shape, angle), 448)[0]
    coverage = image[0].double() / 220  # red on black
    radius_px = 500 * 448 / UNIT
    assert coverage.sum().item() == pytest.approx(AREAS[shape] * radius_px**2, rel=0.01)
    axis = torch.arange(448) + 0.5 - 224
    outside = axis[:, None] ** 2 + axis**2 > (radius_px + 1) ** 2
    assert coverage[outside].max() == 0


def test_object_is_drawn_at_its_place_in_its_color():
    scenes = sample_scenes(torch.arange(60), ScenesConfig(seed=9))
    images = render(scenes, 224)
    assert images.shape == (60, 3, 224, 224) and images.dtype == torch.uint8
    empty = render(dataclasses.replace(scenes, count=torch.zeros_like(scenes.count)), 224)
    rows = scenes.y * 224 // UNIT
    columns = scenes.x * 224 // UNIT
    has_hole = (scenes.shape == SHAPES.index("ring")) | (scenes.shape == SHAPES.index("moon"))
    for index, slot in scenes.present.nonzero().tolist():
        pixel = images[index, :, rows[index, slot], columns[index, slot]]
        if not has_hole[index, slot]:
            assert (pixel - scenes.rgb[index, slot]).abs().max() <= 1
    axis = (torch.arange(224) + 0.5) / 224 * UNIT
    squared = (axis[None, None, :, None] - scenes.y[..., None, None]) ** 2 + (axis - scenes.x[..., None, None]) ** 2
    near = (squared <= (scenes.radius[..., None, None] + UNIT / 224) ** 2) & scenes.present[..., None, None]
    free = ~near.any(dim=1, keepdim=True).expand_as(images)
    torch.testing.assert_close(images[free], empty[free], rtol=0, atol=0)
    assert (images != empty).flatten(1).any(dim=1).all()


def test_rendering_does_not_depend_on_the_batch():
    scenes = sample_scenes(torch.arange(12), ScenesConfig(seed=4))
    alone = torch.cat([render(scenes.select(slice(i, i + 1)), 96) for i in range(12)])
    torch.testing.assert_close(render(scenes, 96), alone, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_makes_the_same_scenes():
    config = ScenesConfig(seed=6)
    on_cpu, on_gpu = sample_scenes(torch.arange(64), config), sample_scenes(torch.arange(64, device="cuda"), config)
    assert_same(on_cpu, on_gpu.to("cpu"))
    difference = (render(on_cpu).int() - render(on_gpu).cpu().int()).abs()
    assert difference.max() <= 1


@pytest.mark.parametrize(
    "values",
    [{"seed": -1}, {"seed": 2**32}, {"min_objects": 0}, {"min_objects": 5, "max_objects": 4}, {"image_size": 8}],
)
def test_impossible_requests_are_refused(values):
    with pytest.raises(InputError):
        ScenesConfig(**values)


def test_export_writes_images_and_llava_json(tmp_path):
    out = export_scenes(tmp_path / "data" / "scenes", 35, seed=3, image_size=64, turns=4, image_format="png")
    rows = json.loads((out / "instructions.json").read_text())
    assert [row["image"] for row in rows] == [f"{index:06d}.png" for index in range(35)]
    assert sorted(path.name for path in out.iterdir()) == ["images", "instructions.json", "scenes.json"]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["scenes"]  # no partial directory is left
    expected = render(sample_scenes(torch.arange(35), ScenesConfig(seed=3)), 64)
    for row, pixels in zip(rows, expected, strict=True):
        with Image.open(out / "images" / row["image"]) as image:
            assert image.mode == "RGB"
            stored = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(64, 64, 3).permute(2, 0, 1)
        torch.testing.assert_close(stored, pixels, rtol=0, atol=0)
        turns = row["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * len(row["types"])
        assert [turn["value"].startswith("<image>\n") for turn in turns] == [True] + [False] * (len(turns) - 1)
        assert len({turn["value"] for turn in turns[::2]}) == len(row["types"]) == 4


def test_bitmaps_hold_the_same_pixels_as_png_files(tmp_path):
    folders = {kind: export_scenes(tmp_path / kind, 2, image_size=64, image_format=kind) for kind in ("bmp", "png")}
    bitmap, png = (Image.open(folders[kind] / "images" / f"000001.{kind}") for kind in folders)
    assert bitmap.format == "BMP" and bitmap.tobytes() == png.tobytes()


def test_export_is_done_once_and_never_overwrites(tmp_path):
    out = export_scenes(tmp_path / "scenes", 4, image_size=64)
    before = (out / "instructions.json").stat()
    export_scenes(out, 4, image_size=64)
    assert (out / "instructions.json").stat() == before
    with pytest.raises(InputError, match=r"another request .*count, seed"):
        export_scenes(out, 5, 1, image_size=64)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "photo.txt").write_text("keep")
    with pytest.raises(InputError, match="holds no exported scenes"):
        export_scenes(mine, 4)
    assert [path.name for path in mine.iterdir()] == ["photo.txt"]


def test_export_names_its_domain(tmp_path):
    out = export_scenes(tmp_path / "clutter", 3, seed=3, image_size=64, domain="clutter", image_format="png")
    expected = render(sample_scenes(torch.arange(3), ScenesConfig(seed=3, domain="clutter")), 64)
    with Image.open(out / "images" / "000002.png") as image:
        stored = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(64, 64, 3).permute(2, 0, 1)
    torch.testing.assert_close(stored, expected[2], rtol=0, atol=0)
    with pytest.raises(InputError, match=r"another request \(different: domain\)"):
        export_scenes(out, 3, seed=3, image_size=64, image_format="png")
    with pytest.raises(InputError, match="'photos' is unknown"):
        export_scenes(tmp_path / "photos", 3, domain="photos")


def test_export_from_before_there_were_domains_is_plain(tmp_path):
    out = export_scenes(tmp_path / "scenes", 3, image_size=64)
    request = json.loads((out / "scenes.json").read_text())
    assert request.pop("domain") == "plain"
    (out / "scenes.json").write_text(json.dumps(request))
    assert export_scenes(out, 3, image_size=64) == out
    with pytest.raises(InputError, match="different: domain"):
        export_scenes(out, 3, image_size=64, domain="clutter")


def test_failed_export_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(export, "_export_chunk", fail)
    with pytest.raises(OSError, match="disk full"):
        export_scenes(tmp_path / "scenes", 4)
    assert list(tmp_path.iterdir()) == []


def test_processes_write_the_same_files(tmp_path):
    one = export_scenes(tmp_path / "one", 40, image_size=48)
    two = export_scenes(tmp_path / "two", 40, image_size=48, workers=2)
    for path in sorted(one.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (two / path.relative_to(one)).read_bytes(), path.name


def test_command_reports_bad_input_and_helps_without_torch(tmp_path, capsys):
    assert main([str(tmp_path / "out"), "--count", "0"]) == 2
    assert capsys.readouterr().err == "error: 0 scenes cannot be exported; give a count from 1 to 10000000.\n"
    code = (
        "import sys; from sf_mllm.data.scenes.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: assert not {'torch', 'transformers', 'PIL'} & set(sys.modules)"
    )
    assert "--count" in subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
