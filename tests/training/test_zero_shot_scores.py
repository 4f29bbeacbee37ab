import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from sf_mllm.data.zero_shot_tasks import ZeroShotTask, read_task_folder
from sf_mllm.errors import InputError
from sf_mllm.training.bootstrap.config import EvaluationConfig, TeacherConfig
from sf_mllm.training.bootstrap.teacher_texts import make_scorer, name_classes, read_tasks
from sf_mllm.training.bootstrap.teachers import TimmTeacher
from sf_mllm.training.bootstrap.zero_shot import ZeroShotResult, ZeroShotScorer, compare

PROMPTS = ("a photo of a {}.", "{}, drawn")


class Numbers:
    """Images whose every pixel is their own number."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def pixels(self, indices, size, device):
        return indices.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, size, size)


def encoder_of(features):
    return lambda pixels: features[pixels[:, 0, 0, 0].long()]


def score(task, image_features, text_features, prompts=("{}",)):
    scorer = ZeroShotScorer([task], lambda texts: text_features(texts), image_size=2, device="cpu", prompts=prompts)
    return scorer, scorer.score(encoder_of(image_features))[0]


def test_the_nearest_candidate_of_each_sample_is_the_answer():
    vectors = {"x": [1.0, 0.0], "y": [0.0, 9.0], "z": [1.0, 1.0]}  # lengths play no part
    choices = [["x", "y"], ["x", "y"], ["x", "y", "z"], ["y", "x", "z"], ["y", "z"]]
    task = ZeroShotTask.from_texts("t", Numbers(5), choices, [0, 1, 2, 0, 1])
    images = torch.tensor([[2.0, 1.0], [2.0, 1.0], [2.0, 1.5], [0.1, 1.0], [1.0, 0.1]])
    _, result = score(task, images, lambda texts: torch.tensor([vectors[text] for text in texts]))
    # The second is wrong. It is nearest to z among all texts and the last to x, but these are none of their candidates.
    assert result == ZeroShotResult("t", 0.8, 5, pytest.approx((3 / 2 + 2 / 3) / 5))


def test_class_names_in_prompts_are_scored_as_open_clip_does_it():
    torch.manual_seed(0)
    clip = open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        text_cfg={"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    ).eval()
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    names = ["cat", "dog", "tree frog", "goldfish", "owl"]
    images, answers = torch.randn(40, 16), torch.randint(0, 5, (40,))
    task = ZeroShotTask("t", Numbers(40), names, torch.arange(5).expand(40, -1), answers, are_class_names=True)
    _, result = score(task, images, lambda texts: clip.encode_text(tokenizer(texts)), PROMPTS)
    templates = [lambda name, prompt=prompt: prompt.format(name) for prompt in PROMPTS]
    classifier = open_clip.build_zero_shot_classifier(clip, tokenizer, names, templates)
    expected = ((F.normalize(images, dim=-1) @ classifier).argmax(dim=1) == answers).float().mean().item()
    assert result.accuracy == pytest.approx(expected) and 0 < expected < 1


def test_parts_of_several_processes_add_up_to_the_whole():
    torch.manual_seed(0)
    texts = [f"text {index}" for index in range(7)]
    tasks = [
        ZeroShotTask(
            f"t{count}", Numbers(count), texts, torch.arange(7).expand(count, -1), torch.randint(0, 7, (count,))
        )
        for count in (1, 2, 200)  # fewer samples than processes, and more
    ]
    text_features, image_features = torch.randn(7, 4), torch.randn(200, 4)
    scorer = ZeroShotScorer(
        tasks, lambda of: text_features[[texts.index(text) for text in of]], image_size=2, device="cpu"
    )
    whole = scorer.count_right(encoder_of(image_features))
    parts = [scorer.count_right(encoder_of(image_features), part, 3) for part in range(3)]
    assert torch.equal(sum(parts), whole) and 0 < whole[2] < 200
    assert [result.samples for result in scorer.results(whole)] == [1, 2, 200]


def result(task, accuracy, samples=400, chance=0.25):
    return ZeroShotResult(task, accuracy, samples, chance)


def test_a_task_is_known_three_standard_errors_above_chance():
    error = (0.25 * 0.75 / 400) ** 0.5
    assert not result("t", 0.25 + 2.99 * error).is_known
    assert result("t", 0.25 + 3.01 * error).is_known
    assert not result("t", 0.25 + 3.01 * error, samples=390).is_known


def test_retention_counts_what_the_teacher_knows():
    teacher = [result("a", 0.8), result("b", 0.26), result("c", 0.5)]
    metrics = compare([result("a", 0.6), result("b", 0.9), result("c", 0.55)], teacher)
    assert metrics["a_retention"] == pytest.approx(0.75) and metrics["c_retention"] == pytest.approx(1.1)
    assert "b_retention" not in metrics  # the teacher guesses
    assert metrics["mean_retention"] == pytest.approx((0.75 + 1.1) / 2)
    assert (metrics["b_accuracy"], metrics["b_teacher_accuracy"], metrics["b_samples"]) == (0.9, 0.26, 400)
    assert metrics["b_chance"] == 0.25
    assert "mean_retention" not in compare(teacher[1:2], teacher[1:2])


def make_class_folder(folder, names):
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / name / "0.png")
    return folder


def test_folders_become_words(tmp_path):
    (task,) = read_task_folder(make_class_folder(tmp_path / "a", ["n01443537", "n01440764"]), 10)
    assert name_classes(task).texts == ["tench", "goldfish"]  # folders are sorted
    (task,) = read_task_folder(make_class_folder(tmp_path / "b", ["n01440764", "tree_frog"]), 10)
    assert name_classes(task).texts == ["n01440764", "tree frog"]


@pytest.fixture
def classifier():
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 3}
    vit = timm.create_model("vit_tiny_patch16_224", **sizes)
    vit.pretrained_cfg["label_names"] = ["c0", "c1", "c2"]
    vit.pretrained_cfg["label_descriptions"] = {"c0": "tree frog, Hyla", "c1": "owl", "c2": "cat"}
    return TimmTeacher(vit)


@pytest.mark.parametrize("names", [["c0", "c2", "c1"], ["0", "1", "2"], ["tree_frog", "owl", "cat"], ["owl", "cat"]])
def test_a_classifier_is_asked_by_labels_names_or_numbers(classifier, tmp_path, names):
    config = EvaluationConfig(zero_shot=str(make_class_folder(tmp_path / "x", names)))
    scorer = make_scorer(config, TeacherConfig(model="x"), classifier, image_size=32, device="cpu")
    index_of = {"c0": 0, "0": 0, "tree_frog": 0, "c1": 1, "1": 1, "owl": 1, "c2": 2, "2": 2, "cat": 2}
    classes = [index_of[name] for name in sorted(names)]
    # Logits that are highest at the true class among the folders, and higher still at one that is no folder.
    logits = F.one_hot(torch.tensor(classes), 3).float()
    logits[:, [index for index in range(3) if index not in classes]] = 5
    assert scorer.score(encoder_of_red(logits, names))[0].accuracy == 1
    wrong = scorer.score(encoder_of_red(-logits, names))[0]
    assert wrong.accuracy == 0 and wrong.chance == pytest.approx(1 / len(names))


def encoder_of_red(features, names):
    """`make_class_folder` wrote the number of each name into the red channel; tasks sort the names."""
    place = torch.tensor([sorted(names).index(name) for name in names])
    return lambda pixels: features[place[pixels[:, 0, 0, 0].long()]]


def test_what_a_classifier_cannot_be_asked(classifier, tmp_path):
    def ask(zero_shot):
        make_scorer(
            EvaluationConfig(zero_shot=zero_shot, samples=2),
            TeacherConfig(model="x"),
            classifier,
            image_size=32,
            device="cpu",
        )

    with pytest.raises(InputError, match=r"'dog' is none of its classes; .* numbered from 0 to 2"):
        ask(str(make_class_folder(tmp_path / "x", ["cat", "dog"])))
    with pytest.raises(InputError, match="'red object' is none of its classes"):
        ask("scenes")


def test_names_of_tasks(tmp_path):
    with pytest.raises(InputError, match=r"'scene' are neither built in nor a folder\. Did you mean 'scenes'"):
        read_tasks("scene", 4)
    assert [task.name for task in read_tasks("scenes", 2)][:3] == ["color", "shape", "size"]
