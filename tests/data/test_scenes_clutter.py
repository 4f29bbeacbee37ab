import dataclasses

import pytest
import torch
from torch import Tensor

from sf_mllm.data.scenes import render as scene_render
from sf_mllm.data.scenes.domains import COLORS, DOMAINS, GLYPHS, MAX_OBJECTS, SHAPES, TEXTURES, UNIT
from sf_mllm.data.scenes.glyphs import DOODLES, FORMS, distance_tables
from sf_mllm.data.scenes.overlap import CLEARLY_HIDDEN, MOST_HIDDEN, MOST_HIDDEN_GLYPH
from sf_mllm.data.scenes.render import render
from sf_mllm.data.scenes.sampling import Scenes, ScenesConfig, concatenate, sample_scenes, shows_texture, tensor_fields
from sf_mllm.errors import InputError

CLUTTER = DOMAINS["clutter"]
IMAGE_SIZE = 224


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return sample_scenes(torch.arange(600), ScenesConfig(seed=1, domain="clutter"))


def assert_same(first: Scenes, second: Scenes) -> None:
    assert first.domain == second.domain
    for name, values in tensor_fields(first).items():
        torch.testing.assert_close(values, getattr(second, name), rtol=0, atol=0)


def without_noise(scenes: Scenes) -> Scenes:
    """The scenes on black, without doodles, grain and noise."""
    blank = torch.zeros_like
    return dataclasses.replace(
        scenes,
        tint=blank(scenes.tint),
        background=blank(scenes.background),
        background_rgb=blank(scenes.background_rgb),
        doodles=scenes.doodles[:, :0],
        grain=torch.full_like(scenes.grain, 127),
        exposure=torch.tensor([[100, 0, 0]]).expand(len(scenes), -1),
    )


def make_scene(*objects: dict[str, int | str]) -> Scenes:
    """A scene on black; objects are given in words, from the hindmost, with x, y and radius in scene units."""
    names = {"size": CLUTTER.sizes, "color": COLORS, "shape": CLUTTER.shapes, "texture": TEXTURES}
    scene = without_noise(sample_scenes(torch.arange(1), ScenesConfig(seed=5, domain="clutter")))
    defaults = {"size": "large", "color": "red", "texture": "plain", "x": UNIT // 2, "y": UNIT // 2}
    columns: dict[str, list[int]] = {}
    for item in objects:
        for name, value in (defaults | {"radius": 500, "angle": 0} | item).items():
            columns.setdefault(name, []).append(names[name].index(value) if isinstance(value, str) else value)
    empty = {"x": 0, "y": 0, "radius": 1, "angle": 0}
    rows = {name: values + [empty.get(name, -1)] * (MAX_OBJECTS - len(objects)) for name, values in columns.items()}
    tensors = {name: torch.tensor([values]) for name, values in rows.items()}
    return dataclasses.replace(scene, count=torch.tensor([len(objects)]), **tensors).update_hidden()


def draw(scene: Scenes, size: int = 448) -> Tensor:
    return render(scene, size)[0].float()


def test_scene_depends_on_seed_and_index_only(scenes):
    config = ScenesConfig(seed=1, domain="clutter")
    assert_same(scenes.select(torch.tensor([31, 2, 17])), sample_scenes(torch.tensor([31, 2, 17]), config))
    assert_same(scenes, concatenate((scenes.select(slice(0, 9)), scenes.select(slice(9, 600)))))
    alone = torch.cat([render(scenes.select(slice(i, i + 1)), 96) for i in range(4)])
    torch.testing.assert_close(render(scenes.select(slice(0, 4)), 96), alone, rtol=0, atol=0)


def test_attributes_are_balanced(scenes):
    assert (torch.bincount(scenes.count, minlength=9)[1:] / len(scenes) * 8 - 1).abs().max() < 0.3
    present = scenes.present
    for values, number in ((scenes.size, 4), (scenes.color, 8)):
        share = torch.bincount(values[present], minlength=number) / present.sum()
        assert (share * number - 1).abs().max() < 0.2
    is_glyph = scenes.shape[present] >= len(SHAPES)
    assert is_glyph.float().mean() == pytest.approx(5 / 8, abs=0.04)
    assert len(scenes.shape[present].unique()) == len(SHAPES) + len(GLYPHS) == 44
    texture = scenes.texture[present]
    seen = shows_texture(scenes.size, scenes.shape)[present]
    assert (texture[~seen] == 0).all()  # nobody could see it
    assert (torch.bincount(texture[seen]) / seen.sum() * 4 - 1).abs().max() < 0.2
    for name in ("size", "color", "shape", "texture", "place"):
        assert (getattr(scenes, name)[~present] == -1).all(), name


def test_only_what_is_large_enough_has_a_pattern(scenes):
    patterned = {
        (CLUTTER.sizes[size], shape >= len(SHAPES))
        for size, shape in zip(*(v[scenes.texture > 0].tolist() for v in (scenes.size, scenes.shape)), strict=True)
    }
    assert patterned == {(size, False) for size in ("small", "medium", "large")} | {("medium", True), ("large", True)}


def test_glyphs_and_crosses_stand_upright(scenes):
    turn = torch.minimum(scenes.angle, UNIT - scenes.angle)[scenes.present]  # 0 .. UNIT / 2
    shape = scenes.shape[scenes.present]
    is_upright = (shape >= len(SHAPES)) | (shape == SHAPES.index("cross"))
    assert UNIT / 20 < turn[is_upright].max() <= UNIT / 18 + 1
    assert (turn[~is_upright] > UNIT / 18).float().mean() > 0.8


def test_objects_touch_only_where_one_clearly_hides_a_part_of_another(scenes):
    hidden = scenes.hidden
    assert (hidden[hidden > 0] >= CLEARLY_HIDDEN).all()
    assert (hidden > 0).any(dim=2).any(dim=1).float().mean() > 0.5  # most scenes have such a pair
    assert ((hidden > 0).sum(dim=1) <= 1).all()  # at most one object in front of each
    assert (hidden > 0).tril(-1).sum() == (hidden > 0).sum()  # later slots lie in front
    limit = torch.where(scenes.shape < len(SHAPES), MOST_HIDDEN, MOST_HIDDEN_GLYPH)
    assert (hidden.sum(dim=1) <= limit)[scenes.present].all()

    dx, dy = (values[:, :, None] - values[:, None] for values in (scenes.x, scenes.y))
    gap = (dx**2 + dy**2).sqrt() - scenes.radius[:, :, None] - scenes.radius[:, None]
    is_pair = scenes.present[:, :, None] & scenes.present[:, None] & ~torch.eye(MAX_OBJECTS, dtype=torch.bool)
    touches = (hidden > 0) | (hidden > 0).transpose(1, 2)
    assert gap[is_pair & ~touches].min() > 0.009 * UNIT
    for centre in (scenes.x, scenes.y):
        assert (torch.minimum(centre, UNIT - centre) - scenes.radius)[scenes.present].min() > 0
        border = torch.minimum((centre - UNIT // 3).abs(), (centre - 2 * UNIT // 3).abs())
        assert border[scenes.present].min() > 0.014 * UNIT


def test_hidden_share_agrees_with_the_pixels(scenes, monkeypatch):
    """Draw the object behind alone and with the one in front, and count pixels of its colour."""
    monkeypatch.setattr(scene_render, "_CONTOUR", 0)
    pairs = (scenes.hidden[:40] > 0).nonzero()[:12]
    assert len(pairs) == 12
    for index, front, back in pairs.tolist():
        fields = ("size", "shape", "x", "y", "radius", "angle")
        both = [{name: int(getattr(scenes, name)[index, slot]) for name in fields} for slot in (back, front)]
        scene = make_scene(both[0] | {"color": "red"}, both[1] | {"color": "cyan"})
        alone = make_scene(both[0] | {"color": "red"})
        pixels, pixels_alone = (draw(item, 896)[0] > 140 for item in (scene, alone))
        found = 1 - pixels.sum().item() / pixels_alone.sum().item()
        # A cell of the tables is a twelfth of the radius wide; the largest difference found is 13.
        assert found * 1000 == pytest.approx(scenes.hidden[index, front, back].item(), abs=25)
        assert scene.hidden[0, 1, 0] == scenes.hidden[index, front, back]


def test_every_form_differs_and_stays_in_its_circle():
    tables = distance_tables(torch.device("cpu"))
    assert tables.shape == (len(FORMS), 65, 65) and len(FORMS) == 44 + len(DOODLES)
    axis = torch.linspace(-1.15, 1.15, 65)
    outside = axis[:, None] ** 2 + axis**2 > 1.001
    assert tables[:, outside].min() > -1e-6
    filled = (tables[:44] < 0).flatten(1).float()
    both = filled @ filled.T
    union = filled.sum(dim=1)[:, None] + filled.sum(dim=1) - both
    overlap = both / union - torch.eye(44)
    assert overlap.max() < 0.95, [FORMS[i] for i in divmod(int(overlap.argmax()), 44)]


def test_glyphs_are_upright_and_the_right_way_round():
    def ink(shape: str) -> Tensor:
        """Share of the ink in the quarters: top left, top right, bottom left, bottom right."""
        red = draw(make_scene({"shape": shape}))[0]
        return red.view(2, 224, 2, 224).sum(dim=(1, 3)).flatten() / red.sum()

    assert ink("letter l").argmin() == 1  # nothing at the top right
    assert ink("digit 7").argmin() == 3
    assert ink("letter j").argmin() == 0 or ink("letter j")[0] < ink("letter j")[1]
    assert ink("letter p")[:2].sum() > ink("letter p")[2:].sum()
    assert ink("letter q")[3] > ink("letter o")[3]


@pytest.mark.parametrize(
    ("texture", "dark_share"), [("plain", 0), ("striped", 1 / 2), ("dotted", 0.28), ("checked", 1 / 2)]
)
def test_patterns_darken_their_share(texture, dark_share):
    red = draw(make_scene({"shape": "square", "texture": texture}))[0]
    middle = red[224 - 33 : 224 + 33, 224 - 33 : 224 + 33]
    assert middle.max() == 220
    is_dark = middle < 0.7 * 220
    assert is_dark.float().mean() == pytest.approx(dark_share, abs=0.06)
    if dark_share:
        assert middle.min() == pytest.approx(0.38 * 220, abs=1)


def test_later_objects_lie_in_front():
    at_left = {"shape": "circle", "color": "red", "x": 1800}
    at_right = {"shape": "circle", "color": "blue", "x": 2400}
    shared = (slice(None), 224, 2100 * 448 // UNIT)
    red_behind, blue_behind = make_scene(at_left, at_right), make_scene(at_right, at_left)
    assert draw(red_behind)[shared].tolist() == [45, 85, 220]
    assert draw(blue_behind)[shared].tolist() == [220, 40, 40]
    for scene in (red_behind, blue_behind):
        assert scene.hidden[0, 1, 0] > CLEARLY_HIDDEN and scene.hidden.sum() == scene.hidden[0, 1, 0]


def test_background_is_restless_and_grey(scenes):
    some = scenes.select(slice(0, 16))
    empty = dataclasses.replace(some, count=torch.zeros_like(some.count))
    images = render(empty, 96).float()
    roughness = (images[..., 1:] - images[..., :-1]).abs().mean(dim=(1, 2, 3))
    assert roughness.min() > 0.5
    undoodled = render(dataclasses.replace(empty, doodles=empty.doodles[:, :0]), 96).float()
    assert ((images - undoodled).abs() > 4).flatten(1).any(dim=1).all()
    assert (images.amax(dim=1) - images.amin(dim=1)).mean(dim=(1, 2)).max() < 45


def test_unknown_domain_is_refused():
    with pytest.raises(InputError, match="'photo' is unknown; choose one of: plain, clutter"):
        ScenesConfig(domain="photo")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_makes_the_same_scenes():
    config = ScenesConfig(seed=6, domain="clutter")
    on_cpu, on_gpu = sample_scenes(torch.arange(64), config), sample_scenes(torch.arange(64, device="cuda"), config)
    assert_same(on_cpu, on_gpu.to("cpu"))
    assert (render(on_cpu).int() - render(on_gpu).cpu().int()).abs().max() <= 1
