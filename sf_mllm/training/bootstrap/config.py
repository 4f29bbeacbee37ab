"""Settings of a bootstrap run; imports nothing heavy."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from sf_mllm.constants import MAX_SEED
from sf_mllm.errors import InputError, nearest

TEACHER_SOURCES = ("open_clip", "timm")


def refuse_expanded_braces(overrides: Sequence[str]) -> None:
    """Notice images that a shell multiplied: of repeated overrides all but the last would be dropped.

    Raises:
        InputError: images are given more than once.
    """
    for key in ("data.images", "data.held_out_images"):
        times = sum(override.startswith(f"{key}=") for override in overrides)
        if times > 1:
            raise InputError(
                f"{key} is given {times} times; put a range into quotes, as in '{key}=/data/{{000..099}}.tar', and "
                f"several descriptions into brackets, as in '{key}=[/data/a, /data/b]'."
            )


@dataclass
class TeacherConfig:
    """Which model is compressed."""

    model: str = MISSING
    """A model name of the source, "local-dir:PATH", "hf-hub:OWNER/NAME", or "demo:clip", the one that ships."""
    source: str = "open_clip"
    """open_clip or timm."""
    pretrained: str | None = None
    """Tag of published weights or a local file; not needed with a directory or a hub repository. No file says which
    activation its weights need: those of OpenAI want a model whose name ends in -quickgelu."""
    image_size: int | None = None
    """Side in pixels at which the teacher sees images, its position embedding resized; null: as it was made."""
    allow_random: bool = False
    """Accept a teacher without weights; for tests of the pipeline only."""


@dataclass
class StudentConfig:
    """How the student differs from its teacher."""

    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of SparseFormerConfig that do not follow from the teacher: num_latents, num_hidden_layers, ..."""
    start_from_class_token: bool = True
    """Start the student's class token from the teacher's."""
    trained_cortex_blocks: int | str | None = None
    """How many of the first inherited blocks train, or "all"; null: those below two thirds of the teacher's depth, as
    in the paper."""
    train_head: bool = False
    """Train the final norm, the attention pool and the projection too; else they stay the teacher's."""
    kernels: str = "auto"
    """What convolves, pools, samples, mixes and attends in training: "torch", PyTorch's own operations, "triton",
    kernels for CUDA devices, or "auto": those on devices that they are tested on, of compute capability 9.0. They make
    no other student."""


@dataclass
class DataConfig:
    """Unlabelled images and how they are cut."""

    images: Any = MISSING
    """One description or a list of them: a folder, read with its subfolders; "scenes", the built-in drawings; parquet
    or arrow files (also *.parquet or their folder), a folder of save_to_disk, hf:OWNER/NAME[:split]; or tar shards of
    the WebDataset layout (/data/{000..099}.tar, /data/*.tar, pipe:COMMAND, https://...), which mix with nothing else.
    """
    image_column: str | None = None
    """Column of a table, or extension in a tar sample, that holds the images; null where there is only one."""
    held_out_images: Any = None
    """Images to measure on, described like `images`; null: some of `images`, of tar shards those of the last one."""
    shuffle_buffer: int = 1024
    """Undecoded images that each reader of tar shards holds to shuffle them."""
    scenes_count: int = 2000
    """Number of built-in scenes to draw, held-out ones included."""
    scenes_domain: str = "plain"
    """What they show: "plain", or "clutter" with digits, letters, patterns and overlapping objects."""
    resolution: int = 224
    """Side in pixels of the square that held-out images are squeezed to, as the saved image processor will; the teacher
    sees the same pixels at its own size."""
    resolutions: list[Any] | None = None
    """Sizes of the training crops, sides or [height, width]; each step takes one of them; null: `resolution`."""
    min_crop_area: float = 0.4
    """Smallest share of an image that a random crop takes."""
    max_aspect_ratio: float = 4 / 3
    """How much wider or higher than an undistorted or a whole, squeezed image a crop may be."""
    flip: bool = True
    """Mirror half of the crops."""
    color_jitter: float = 0.0
    """Largest change of brightness, contrast and saturation, as a share; 0 leaves colours alone."""
    seed: int = 0
    """Which images are held out, and what is in built-in scenes and in the crops of a teacher store: apart from the
    run's `seed`, so that runs of several seeds share all of this."""
    held_out: int = 256
    """Images kept out of training, to measure agreement with the teacher on; two, since regions are compared."""
    max_unreadable_share: float = 0.01
    """A run stops when more than this share of its images cannot be decoded; below it they are logged and replaced."""


@dataclass
class LossConfig:
    """Weights of the losses."""

    embedding: float = 1.0
    """1 - cosine between the image embeddings; for teachers that give one."""
    classification: float = 1.0
    """Divergence of the student's class probabilities from the teacher's; for teachers that classify."""
    tokens: float = 1.0
    """1 - cosine between a latent token and the teacher's features inside its final region."""
    coverage: float = 1.0
    """What averages inside the final regions do not explain of the teacher's features, mostly where they vary."""
    attraction: float = 0.0
    """Squared distance of the final regions' centres from where they would be dealt out over the teacher's content, in
    image sizes."""
    roi_hinge: float = 0.5
    """Distance of region edges outside the image, in image sizes."""
    size_hinge: float = 0.0
    """What regions lack in width and height to tile the image, were they all of one size."""
    point_hinge: float = 10.0
    """Distance of sampling points outside the image, from 2 % inside it on."""


@dataclass
class EvaluationConfig:
    """What each evaluation measures besides agreement with the teacher and where the regions are."""

    zero_shot: str | None = None
    """Tasks that student and teacher solve: "scenes" or "clutter", built in; a folder that holds tasks.jsonl, or a
    folder of images for each class; null: none."""
    samples: int = 512
    """Most samples a task; and scenes on which it is measured whether regions find objects, if the tasks are scenes."""
    prompts: list[str] = field(default_factory=lambda: ["a photo of a {}."])
    """A CLIP reads the name of a class in place of "{}"; of several prompts the features are averaged."""


@dataclass
class StoreConfig:
    """Where the teacher's outputs are kept, so that it runs once and not every epoch."""

    path: str | None = None
    """Directory that `python -m sf_mllm.training.reinforce` makes and a run reads in place of asking the teacher; null:
    the teacher sees every crop of every epoch."""
    crops: int = 4
    """Crops stored for each training image; a run takes the next one each epoch, then begins again. Like `grid` it
    counts where the store is made; a run takes what is there."""
    grid: int = 7
    """The teacher's patch features are averaged to this many squared, its own number and above keep them as they are: a
    crop costs about grid^2 x width bytes. Regions as small as one of these cells learn from blurred features."""


@dataclass
class BootstrapConfig:
    """A bootstrap run."""

    output_dir: str = MISSING
    """Run folder; the encoder ends up in its subfolder "encoder"."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    inherited_learning_rate: float = 3e-4
    """Peak rate of inherited cortex blocks; new parts use train.learning_rate."""
    seed: int = 0
    """Initial weights, order of the images and augmentation."""
    train: dict[str, Any] = field(default_factory=dict)
    """Any fields of transformers.TrainingArguments."""

    def __post_init__(self) -> None:
        """Check values that do not depend on the teacher or on the data."""
        if self.teacher.source not in TEACHER_SOURCES:
            raise InputError(
                f"teacher.source '{self.teacher.source}' is unknown.{nearest(self.teacher.source, TEACHER_SOURCES)} "
                f"Allowed: {', '.join(TEACHER_SOURCES)}."
            )
        for name, value, is_valid, allowed in (
            ("data.min_crop_area", self.data.min_crop_area, 0 < self.data.min_crop_area <= 1, "above 0 and at most 1"),
            ("data.max_aspect_ratio", self.data.max_aspect_ratio, self.data.max_aspect_ratio >= 1, "at least 1"),
            ("data.color_jitter", self.data.color_jitter, 0 <= self.data.color_jitter <= 1, "from 0 to 1"),
            ("data.shuffle_buffer", self.data.shuffle_buffer, self.data.shuffle_buffer >= 1, "at least 1"),
            ("data.max_unreadable_share", self.data.max_unreadable_share, 0 <= self.data.max_unreadable_share < 1,
             "at least 0 and below 1"),
            ("data.resolution", self.data.resolution, self.data.resolution >= 8, "at least 8"),
            ("data.seed", self.data.seed, 0 <= self.data.seed <= MAX_SEED, f"from 0 to {MAX_SEED}"),
            ("data.held_out", self.data.held_out, self.data.held_out >= 2, "at least 2"),
            ("evaluation.samples", self.evaluation.samples, self.evaluation.samples >= 2, "at least 2"),
            ("evaluation.prompts", self.evaluation.prompts,
             all("{}" in prompt for prompt in self.evaluation.prompts) and self.evaluation.prompts,
             'one or more sentences with "{}" in the place of the class'),
            ("store.crops", self.store.crops, self.store.crops >= 1, "at least 1"),
            ("store.grid", self.store.grid, self.store.grid >= 1, "at least 1"),
            ("teacher.image_size", self.teacher.image_size, self.teacher.image_size is None
             or self.teacher.image_size >= 8, "null or at least 8"),
            ("inherited_learning_rate", self.inherited_learning_rate, self.inherited_learning_rate >= 0, "at least 0"),
            ("seed", self.seed, 0 <= self.seed <= MAX_SEED, f"from 0 to {MAX_SEED}"),
        ):  # fmt: skip
            if not is_valid:
                raise InputError(f"{name} must be {allowed}, got {value}.")
