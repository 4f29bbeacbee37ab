"""Print the tables of README.md and of the demo model's card from eval/results: `python scripts/results_table.py`."""

import csv
from pathlib import Path

ROOT = Path(__file__).parents[1]

QUESTION_EXAMPLES = {
    "color": "What color is the circle?",
    "shape": "What shape is the small red object?",
    "size": "How big is the star?",
    "count": "How many blue objects are there?",
    "existence": "Is there a green heart?",
    "position": "Where is the red square?",
    "relation": "Is the moon left of the square?",
    "comparison": "Are there more stars than rings?",
    "description": "What do you see?",
    "mean": "",
}
CLUTTER_TASKS = {
    "color": "colour",
    "texture": "texture",
    "shape": "shape",
    "glyph": "digit or letter",
    "tiny_glyph": "tiny digit or letter",
    "size": "size",
    "count": "count",
    "one_attribute": "attribute of one object among several",
    "swap": "colours of two objects swapped",
    "position": "position",
    "front": "which one is in front",
}
"""What the teacher of the study `clutter-2` knows, in the order of its rows."""
TASK_NAMES = {
    "color": "colour",
    "shape": "shape",
    "size": "size",
    "count": "count",
    "one_attribute": "attribute of one object among several",
    "swap": "colours of two objects swapped",
    "position": "position",
    "relation": "relation",
}


def read_rows(benchmark: str) -> list[dict[str, str]]:
    """Return the rows of one results file; of rows measured again the last one counts."""
    with (ROOT / "eval" / "results" / f"{benchmark}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def question_table() -> str:
    """Questions about scenes: chat model, decoder alone, majority."""
    plain = [row for row in read_rows("scene_qa") if row["protocol"].startswith("scenes-qa")]
    rows = {(row["model"], row["type"]): row for row in plain}
    lines = [
        "| question | example | from the image | from words | most frequent answer |",
        "|---|---|---|---|---|",
    ]
    for kind, example in QUESTION_EXAMPLES.items():
        image, text = rows["demo:sf_llava", kind], rows["demo:decoder", kind]
        figures = " | ".join(_percent(value) for value in (image["accuracy"], text["accuracy"], image["majority"]))
        lines.append(f"| {kind} | {example} | {figures} |")
    return "\n".join(lines)


def zero_shot_table() -> str:
    """Zero-shot tasks: teacher, and the encoder in its place."""
    rows = {(row["encoder"], row["task"]): row for row in read_rows("zero_shot") if row["clip"] == "demo:clip"}
    lines = ["| task | chance | teacher, 197 tokens | encoder, 49 tokens |", "|---|---|---|---|"]
    for task, name in TASK_NAMES.items():
        teacher, encoder = rows["its own", task], rows["demo:sf_llava", task]
        shares = (teacher["chance"], teacher["accuracy"], encoder["accuracy"])
        lines.append(f"| {name} | " + " | ".join(map(_percent, shares)) + " |")
    return "\n".join(lines)


def clutter_table() -> str:
    """Zero-shot tasks about cluttered scenes: teacher, and students of three sizes."""
    runs = [row for row in read_rows("bootstrap_runs") if row["study"] == "clutter-2"]
    runs.sort(key=lambda row: -int(row["tokens_per_image"]))
    accuracies = []  # for each run by task, student's and teacher's
    for run in runs:
        words = run["accuracies"].split()
        accuracies.append({task: pair.split("/") for task, pair in zip(words[::2], words[1::2], strict=True)})
    lines = [
        "| task | teacher, 197 tokens | " + " | ".join(f"{run['tokens_per_image']} tokens" for run in runs) + " |",
        "|---|---|" + "---|" * len(runs),
    ]
    for task, name in CLUTTER_TASKS.items():
        figures = [accuracies[0][task][1], *(by_task[task][0] for by_task in accuracies)]
        lines.append(f"| {name} | " + " | ".join(f"{figure} %" for figure in figures) + " |")
    lines.append("| mean retention |  | " + " | ".join(_percent(run["mean_retention"]) for run in runs) + " |")
    return "\n".join(lines)


def precision_table() -> str:
    """Relative error of the encoder's outputs in reduced precision."""
    rows = {(row["model"], row["mode"], row["field"]): row for row in read_rows("precision")}
    models = {
        "sparseformer_btsp_openai_clip_base": "base, random weights",
        "sparseformer_btsp_openai_clip_large": "large, random weights",
        "demo:sf_llava": "demo, trained",
    }
    lines = ["| encoder | mode | embedding | tokens | RoIs |", "|---|---|---|---|---|"]
    for model, name in models.items():
        for mode in ("bf16 autocast", "fp16 autocast", "bf16 model"):
            errors = (
                float(rows[model, mode, field]["relative_error"])
                for field in ("pooler_output", "last_hidden_state", "rois")
            )
            place = ", on a CPU" if rows[model, mode, "rois"]["device"].startswith("CPU") else ""
            lines.append(f"| {name}{place} | {mode} | " + " | ".join(f"{100 * error:.2g} %" for error in errors) + " |")
    return "\n".join(lines)


def _percent(share: str) -> str:
    return f"{100 * float(share):.1f} %"


if __name__ == "__main__":
    print(question_table(), zero_shot_table(), clutter_table(), precision_table(), sep="\n\n")
