import csv
import json
import subprocess
import threading
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from eval.bootstrap_runs import main
from sf_mllm.config import load_run_config
from sf_mllm.training.bootstrap.config import BootstrapConfig

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "eval/studies"
RECORD = {
    "outcome": "complete",
    "command": ["python", "-m", "sf_mllm.training.bootstrap", "some.yaml"],
    "versions": {"torch": "2.11.0", "transformers": "5.17.0", "python": "3.12.3"},
    "device": "1 x GPU",
    "revision": "0123456789",
    "starts": [{"at": "2026-01-02T03:04:05+00:00"}],
    "wall_time_of_last_start_s": 12.5,
    "speed": {"images_per_s": 1000.0},
    "steps": 4,
}


def write_run(folder, coverage, scores, **record):
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(RECORD | record))
    (folder / "config.yaml").write_text(f"output_dir: {folder}\nloss: {{coverage: {coverage}, tokens: 1.0}}\n")
    row = {"step": 4, "eval_embedding_cosine": 0.91239}
    for task, (student, teacher) in scores.items():
        row |= {f"eval_{task}_accuracy": student, f"eval_{task}_teacher_accuracy": teacher}
        row |= {f"eval_{task}_chance": 0.1, f"eval_{task}_samples": 64, f"eval_{task}_retention": student / teacher}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ({"step": 4, "loss": 1.0}, row)))
    return folder


def test_rows_say_what_differs_and_what_came_out(tmp_path):
    runs = [
        write_run(tmp_path / "a", 0.0, {"color": (0.8, 1.0), "count": (0.45, 0.9)}),
        write_run(
            tmp_path / "b", 2.0, {"color": (0.9, 1.0), "count": (0.9, 0.9)}, outcome="failed: no memory\nDetails."
        ),
    ]
    arguments = ["collect", *map(str, runs), "--study", "s", "--note", "n", "--rows", str(tmp_path / "rows")]
    assert main(arguments) == 0
    with (tmp_path / "rows/bootstrap_runs.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["settings"], second["settings"]) == ("loss.coverage=0.0", "loss.coverage=2.0")
    assert (first["lowest_retention"], second["lowest_retention"]) == ("count 0.5", "color 0.9")
    assert first["accuracies"] == "color 80.0/100.0 count 45.0/90.0"
    assert (first["embedding_cosine"], first["mean_retention"], first["images_per_s"]) == ("0.9124", "", "1000.0")
    assert (first["date"], first["revision"], first["note"], first["run"]) == ("2026-01-02", "0123456", "n", "a")
    assert second["outcome"] == "failed: no memory"


def test_a_run_that_failed_before_it_logged_anything_is_a_row(tmp_path):
    run = write_run(tmp_path / "a", 0.0, {}, outcome="failed: the loss is nan")
    (run / "metrics.jsonl").unlink()
    assert main(["collect", str(run), "--study", "s", "--rows", str(tmp_path / "rows")]) == 0
    with (tmp_path / "rows/bootstrap_runs.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["outcome"], row["embedding_cosine"], row["steps"]) == ("failed: the loss is nan", "", "4")


def test_a_failing_arm_is_named_and_counted(tmp_path, capsys):
    study = tmp_path / "study.yaml"
    study.write_text("config: configs/bootstrap/demo.yaml\narms: {wrong: [loss.nothing=1], other: [loss.none=2]}\n")
    assert main(["train", "--out", str(tmp_path / "out"), "--parallel", "2", str(study), "loss.tokens=2"]) == 2
    assert "wrong: failed" in capsys.readouterr().out
    assert "unknown key 'nothing'" in (tmp_path / "out/wrong.log").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), ("arms: {}", "must have the keys"), ("[1]", "must have the keys")],
)
def test_what_is_no_study_is_refused(tmp_path, capsys, content, message):
    study = tmp_path / "study.yaml"
    if content is not None:
        study.write_text(content)
    assert main(["train", "--out", str(tmp_path / "out"), str(study)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("study", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_arm_of_a_study_is_a_configuration(study):
    content = OmegaConf.to_container(OmegaConf.load(study))
    given = ["teacher.model=demo:clip", "data.images=images", "output_dir=out"]
    for overrides in content["arms"].values():
        config = load_run_config(BootstrapConfig, ROOT / content["config"], [*content["overrides"], *overrides, *given])
        assert config.evaluation.zero_shot is not None


def test_arms_are_dealt_over_the_gpus(tmp_path, monkeypatch):
    seen = []
    together = threading.Barrier(3)  # breaks if fewer arms run at once

    def run(command, env, **_):
        together.wait(timeout=20)
        seen.append(env["CUDA_VISIBLE_DEVICES"])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.setattr(subprocess, "run", run)
    study = tmp_path / "study.yaml"
    study.write_text("config: c.yaml\narms: {a: [], b: [], c: [], d: [], e: [], f: []}\n")
    assert main(["train", "--out", str(tmp_path / "out"), "--parallel", "3", str(study)]) == 0
    assert sorted(seen) == ["5", "5", "5", "5", "7", "7"]
