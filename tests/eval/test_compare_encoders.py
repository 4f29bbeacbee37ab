import csv
import json
import shutil
from dataclasses import fields, replace
from functools import partialmethod
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from torch import nn

from eval.compare_data import (
    TRAINING_SEED,
    TensorConversations,
    Texts,
    encode_scenes,
    make_texts,
    render_scenes,
    scene_conversations,
)
from eval.compare_encoders import SIZES, main
from eval.compare_model import join_llava
from eval.compare_parts import Parts, Settings, Tower
from eval.compare_run import Run, answer, build_model, encode_prompts, make_trainer, plan_runs
from eval.compare_table import _SHARED, markdown_table
from eval.peers.all_tokens import AllTokens
from eval.peers.average_pooling import AveragePooling
from eval.peers.pixel_shuffle import PixelShuffle
from eval.peers.resampler import Resampler
from eval.peers.teacher_patches import TeacherPatches
from eval.scene_qa import HELD_OUT_SEED, answer_from_images, held_out_questions
from sf_mllm.bench.our_towers import EncoderTokens
from sf_mllm.constants import IMAGE_TOKEN
from sf_mllm.data.chat import encode_conversation
from sf_mllm.errors import InputError
from sf_mllm.inference.replay import Replay, generation_config
from sf_mllm.training.instruct.parts import join
from tests.tape import TapeRecorder
from tests.tiny_text import make_tokenizer
from tests.tiny_vlm import make_decoder, make_encoder, make_image_processor, make_sf_llava

SETTINGS = Settings(
    teacher="demo:clip",
    encoders=("tiny",),
    decoder="demo:decoder",
    domain="plain",
    learning_rate=1e-3,
    size="tiny",
    **SIZES["tiny"],
)
CPU = torch.device("cpu")
RUN = Run("patches", seed=0, projector_learning_rate=1e-3, layer=-2)


def random_tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blocks_of(patches, side):
    """[B, M, 4, D]: the patches of each block of 2 x 2, row by row, without any library's notion of a map."""
    half = side // 2
    return torch.stack(
        [
            torch.stack([patches[:, (2 * y + dy) * side + 2 * x + dx] for dy in (0, 1) for dx in (0, 1)], dim=1)
            for y in range(half)
            for x in range(half)
        ],
        dim=1,
    )


class TestPeers:
    def test_pooling_is_the_mean_of_each_block(self):
        patches = random_tokens(2, 36, 5)
        peer = AveragePooling(5, 36)
        torch.testing.assert_close(peer(patches), blocks_of(patches, 6).mean(dim=2))
        assert (peer.num_tokens, peer.out_width) == (9, 5)

    def test_pixel_shuffle_puts_each_block_side_by_side(self):
        patches = random_tokens(2, 36, 5)
        peer = PixelShuffle(5, 36)
        wide = blocks_of(patches, 6).transpose(2, 3).flatten(2)  # channel by channel
        expected = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(peer(patches), expected)
        assert (peer.num_tokens, peer.out_width) == (9, 20)

    def test_resampler_is_attention_written_out(self):
        torch.manual_seed(0)
        peer = Resampler(5, 36, out_width=16, heads=2, layers=2)
        patches = random_tokens(2, 36, 5)
        values = nn.functional.layer_norm(patches @ peer.keys.weight.T, (16,))
        queries = peer.queries[None].repeat(2, 1, 1)
        for layer in peer.layers:
            attention = layer.attention
            asked = nn.functional.layer_norm(queries, (16,)) + peer.query_positions
            (wq, wk, wv), (bq, bk, bv) = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
            q, k, v = asked @ wq.T + bq, (values + peer.key_positions) @ wk.T + bk, values @ wv.T + bv
            heads = []
            for head in (slice(0, 8), slice(8, 16)):
                weights = (q[..., head] @ k[..., head].transpose(1, 2) / 8**0.5).softmax(-1)
                heads.append(weights @ v[..., head])
            queries = queries + torch.cat(heads, dim=-1) @ attention.out_proj.weight.T + attention.out_proj.bias
            queries = queries + layer.feed_forward(queries)
        torch.testing.assert_close(peer(patches), nn.functional.layer_norm(queries, (16,)))
        assert peer(patches).shape == (2, peer.num_tokens, peer.out_width) == (2, 9, 16)

    def test_positions_of_a_query_are_those_of_the_keys_around_it(self):
        peer = Resampler(8, 196, out_width=64, heads=1)
        similarity = peer.query_positions @ peer.key_positions.T  # [49, 196]
        nearest = similarity.argmax(dim=1)
        rows, columns = nearest // 14 // 2, nearest % 14 // 2
        assert (rows * 7 + columns).tolist() == list(range(49))

    @pytest.mark.parametrize("layer", [-2, -1])
    def test_patches_are_those_in_front_of_and_behind_the_last_block(self, layer):
        torch.manual_seed(0)
        vision = {"image_size": 64, "patch_size": 16, "width": 32, "layers": 3, "head_width": 16}
        text = {"context_length": 4, "vocab_size": 4, "width": 16, "heads": 1, "layers": 1}
        visual = open_clip.CLIP(8, vision, text).visual.eval()
        seen = {}
        visual.transformer.resblocks[2].register_forward_hook(
            lambda _, inputs, out: seen.update(before=inputs[0], out=out)
        )
        pixels = random_tokens(2, 3, 64, 64)
        tower = TeacherPatches(visual, image_size=64, layer=layer)
        with torch.no_grad():
            visual(pixels)  # fills `seen`
            expected = seen["before"][:, 1:] if layer == -2 else visual.ln_post(seen["out"][:, 1:])
            seen.clear()
            torch.testing.assert_close(tower(pixels), expected)
        assert bool(seen) == (layer == -1)  # the last block is not run in vain
        assert expected.shape == (2, tower.num_tokens, tower.width)

    @pytest.mark.parametrize("patches", [35, 25])
    def test_grids_that_do_not_fall_into_blocks_are_refused(self, patches):
        with pytest.raises(InputError, match=f"{patches} patches are no square grid"):
            AveragePooling(4, patches)

    def test_what_cannot_be_is_refused(self):
        with pytest.raises(InputError, match="must divide by 4 and by 3"):
            Resampler(4, 16, out_width=16, heads=3)
        with pytest.raises(InputError, match="Teacher layer -3"):
            TeacherPatches(nn.Identity(), image_size=32, layer=-3)


class TestModel:
    def test_it_computes_what_the_package_does_with_our_encoder(self):
        tokenizer = make_tokenizer()
        encoder, decoder = make_encoder(), make_decoder(vocab_size=len(tokenizer))
        ours, processor = join(encoder, make_image_processor(), decoder, tokenizer)
        reduce = AllTokens(encoder.config.hidden_size, encoder.config.num_tokens)
        theirs = join_llava(EncoderTokens(encoder), reduce, decoder, processor.tokenizer)
        theirs.model.multi_modal_projector.project.load_state_dict(ours.model.multi_modal_projector.state_dict())
        images = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
        inputs = processor(images=images, text=["<image>\nWhat?", "<image>\nHow?"], return_tensors="pt")
        with torch.no_grad():
            expected = ours.eval()(**inputs).logits
            torch.testing.assert_close(theirs.eval()(**inputs).logits, expected)
            pixel_values = inputs.pop("pixel_values")
            seen_before = encoder(pixel_values).last_hidden_state
            torch.testing.assert_close(theirs(**inputs, pixel_values=seen_before).logits, expected)
        assert theirs.generation_config.eos_token_id == ours.generation_config.eos_token_id
        assert theirs.generation_config.suppress_tokens == ours.generation_config.suppress_tokens

    def test_answers_are_those_of_the_package_to_the_same_images(self):
        model, processor = make_sf_llava()
        encoder = model.model.vision_tower
        asked = [item for item in held_out_questions(30) if item.question.type != "description"][:6]
        expected = answer_from_images(model, processor, asked)

        def prepare(images):
            return processor.image_processor(images, return_tensors="pt")["pixel_values"]

        tower = Tower(EncoderTokens(encoder), prepare, encoder.config.hidden_size, encoder.config.num_tokens)
        features = encode_scenes(tower, "plain", HELD_OUT_SEED, asked[-1].index + 1, image_size=224, device=CPU)
        reduce = AllTokens(tower.width, tower.num_tokens)
        decoder = make_decoder(vocab_size=model.lm_head.out_features)
        theirs = join_llava(None, reduce, decoder, processor.tokenizer).eval()
        theirs.model.multi_modal_projector.project.load_state_dict(model.model.multi_modal_projector.state_dict())
        assert answer(theirs, processor.tokenizer, asked, features, tower.num_tokens) == expected
        assert len(set(expected)) > 1

    def test_a_decoder_without_an_image_token_is_refused(self):
        tokenizer = make_tokenizer(sentencepiece=True)
        tokenizer.convert_tokens_to_ids = lambda token: tokenizer.unk_token_id
        with pytest.raises(InputError, match="has no token <image>"):
            join_llava(None, AllTokens(4, 4), make_decoder(vocab_size=len(tokenizer)), tokenizer)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    tokenizer = Parts(SETTINGS).tokenizer()
    return {
        kind: make_texts(
            tokenizer,
            "plain",
            12,
            with_images=kind == "image",
            max_length=96,
            workers=1,
            file=folder / f"{kind}.safetensors",
        )
        for kind in ("image", "text")
    }


class TestData:
    @pytest.mark.parametrize("num_tokens", [1, 4, 7])
    def test_rows_are_what_stage_two_makes_of_the_conversations(self, texts, num_tokens):
        tokenizer = Parts(SETTINGS).tokenizer()
        image = tokenizer.convert_tokens_to_ids("<image>")
        data = TensorConversations(
            texts["image"], torch.zeros(12, 1, 1), image_token_id=image, num_tokens=num_tokens, device=CPU
        )
        batch = data.__getitems__([5, 0])
        for row, index in enumerate([5, 0]):
            (messages,) = scene_conversations("plain", [index], with_images=True)
            expected = encode_conversation(tokenizer, messages, image_seq_length=num_tokens).truncated(95 + num_tokens)
            length = len(expected.input_ids)
            assert batch["input_ids"][row, :length].tolist() == expected.input_ids
            assert batch["labels"][row, :length].tolist() == expected.labels
            assert (batch["input_ids"][row, length:] == tokenizer.pad_token_id).all()
            assert (batch["labels"][row, length:] == -100).all()

    def test_without_an_image_there_is_none(self, texts):
        tokenizer = Parts(SETTINGS).tokenizer()
        image = tokenizer.convert_tokens_to_ids("<image>")
        data = TensorConversations(texts["text"], None, image_token_id=image, num_tokens=0, device=CPU)
        batch = data.__getitems__(list(range(12)))
        assert batch.keys() == {"input_ids", "labels"}
        assert not (batch["input_ids"] == image).any()
        with_image = TensorConversations(texts["image"], None, image_token_id=image, num_tokens=0, device=CPU)
        assert (with_image.input_ids == image).any(dim=1).all()  # the questions are those asked about an image
        for row in range(12):  # one is cut two tokens earlier than the other
            heard, said = (d.input_ids[row][d.labels[row] != -100].tolist() for d in (with_image, data))
            assert heard and heard == said[: len(heard)]

    def test_texts_are_made_once(self, texts, tmp_path):
        tokenizer = Parts(SETTINGS).tokenizer()
        file = tmp_path / "texts.safetensors"
        arguments = {"with_images": True, "max_length": 96, "workers": 1, "file": file}
        first = make_texts(tokenizer, "plain", 12, **arguments)
        assert list(tmp_path.iterdir()) == [file]
        written = file.stat().st_mtime_ns
        again = make_texts(tokenizer, "plain", 12, **arguments)
        assert file.stat().st_mtime_ns == written
        for made in (first, again):
            assert torch.equal(made.input_ids, texts["image"].input_ids)
            assert torch.equal(made.labels, texts["image"].labels)

    @pytest.mark.parametrize(("variant", "domain"), [("patches", "plain"), ("ours-4", "clutter")])
    def test_tokens_of_a_scene_are_those_the_tower_makes_of_it(self, variant, domain):
        parts = Parts(SETTINGS)
        tower = parts.tower(variant, -2)
        features = encode_scenes(tower, domain, TRAINING_SEED, 3, image_size=parts.image_size, device=CPU)
        image = render_scenes(domain, TRAINING_SEED, [2], parts.image_size, CPU)
        with torch.no_grad():
            torch.testing.assert_close(features[2:], tower.module(tower.prepare(image)))
        assert features.shape == (3, tower.num_tokens, tower.width)
        assert not torch.allclose(features[0], features[2])


def trivial_task(with_image):
    """Conversations whose answer, one of two tokens, only the image tells: [image] question answer."""
    kinds = torch.arange(64) % 2
    image, question = torch.full((64, 1), 4), torch.full((64, 1), 20)
    answers = 30 + kinds[:, None]
    ids = torch.cat(([image] if with_image else []) + [question, answers], dim=1)
    labels = torch.full_like(ids, -100)
    labels[:, -1] = answers[:, 0]
    directions = random_tokens(2, 16, 32)
    return Texts(ids, labels), directions[kinds] if with_image else None, kinds


class TestTraining:
    @pytest.mark.parametrize("variant", ["patches", "pooled", "pixel-shuffle", "resampler", "none"])
    def test_only_who_sees_the_image_learns_what_it_shows(self, tmp_path, variant):
        parts = Parts(replace(SETTINGS, steps=40, batch_size=16, learning_rate=1e-2, lora_rank=8))
        run = Run(variant, 0, 5e-3, None)
        tower = parts.tower(variant, -2)
        texts, features, kinds = trivial_task(with_image=variant != "none")
        (tmp_path / "runs").mkdir()
        model, _, num_tokens = build_model(parts, run, tower)
        assert model.config.image_token_id == 4
        data = TensorConversations(texts, features, image_token_id=4, num_tokens=num_tokens, device=CPU)
        trainer = make_trainer(model, parts.settings, run, data, tmp_path, CPU)
        trainer.train()
        batch = data.__getitems__(list(range(64)))
        del batch["labels"]
        with torch.no_grad():
            answers = model.merge_and_unload().eval()(**batch).logits[:, -2].argmax(-1)
        right = (answers == 30 + kinds).float().mean()
        assert right == (0.5 if variant == "none" else 1.0)

    def test_compiled_training_has_one_graph_for_all_layers(self, tmp_path, monkeypatch):
        torch._dynamo.reset()
        graphs: list[torch.fx.GraphModule] = []
        backend = lambda graph, inputs: graphs.append(graph) or graph.forward  # noqa: E731
        monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=backend))
        (tmp_path / "runs").mkdir()
        losses = []
        for compiled in (False, True):
            parts = Parts(replace(SETTINGS, steps=3, batch_size=16))
            model, _, num_tokens = build_model(parts, RUN, parts.tower(RUN.variant, RUN.layer))
            texts, features, _ = trivial_task(with_image=True)
            data = TensorConversations(texts, features, image_token_id=4, num_tokens=num_tokens, device=CPU)
            trainer = make_trainer(model, parts.settings, RUN, data, tmp_path, CPU, compiled)
            trainer.train()
            losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert len(graphs) == 1 and model.config.text_config.num_hidden_layers == 2
        assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(losses[0]) == 3

    def test_variants_of_a_seed_share_batches_and_the_start_of_their_adapters(self, tmp_path):
        orders, adapters = {}, {}
        (tmp_path / "runs").mkdir()
        for variant, seed in (("pixel-shuffle", 0), ("none", 0), ("pixel-shuffle", 1)):
            parts = Parts(replace(SETTINGS, steps=6, batch_size=16))
            run = replace(RUN, variant=variant, seed=seed)
            model, _, num_tokens = build_model(parts, run, parts.tower(variant, -2))
            adapters[variant, seed] = {n: p.clone() for n, p in model.named_parameters() if "lora_" in n}
            texts, features, _ = trivial_task(with_image=variant != "none")
            data = TensorConversations(texts, features, image_token_id=4, num_tokens=num_tokens, device=CPU)
            order = orders[variant, seed] = []
            get = data.__getitems__
            data.__class__ = type("Recorded", (TensorConversations,), {})
            data.__class__.__getitems__ = lambda _, indices, order=order, get=get: (
                order.append(indices),
                get(indices),
            )[1]
            make_trainer(model, parts.settings, run, data, tmp_path, CPU).train()
        assert len(orders["pixel-shuffle", 0]) >= 6
        assert orders["pixel-shuffle", 0] == orders["none", 0] != orders["pixel-shuffle", 1]
        first, second, other = adapters["pixel-shuffle", 0], adapters["none", 0], adapters["pixel-shuffle", 1]
        assert first and first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert not all(torch.equal(first[name], other[name]) for name in first)

    def test_what_trains_is_projector_and_adapters(self):
        parts = Parts(SETTINGS)
        for variant in ("resampler", "ours-4"):
            tower = parts.tower(variant, -2)
            model, _, _ = build_model(parts, replace(RUN, variant=variant), tower)
            trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
            assert all("lora_" in name or "multi_modal_projector.modules_to_save" in name for name in trained)
            assert any("reduce.queries" in name for name in trained) == (variant == "resampler")
            assert not any(parameter.requires_grad for parameter in tower.module.parameters())

    def test_answers_follow_the_image_if_there_is_one(self):
        parts = Parts(SETTINGS)
        asked = held_out_questions(5)
        for variant in ("patches", "none"):
            tower = parts.tower(variant, -2)
            decoder, tokenizer = parts.decoder()
            torch.manual_seed(0)
            model = join_llava(None, parts.peer(variant, tower, decoder), decoder, tokenizer).eval()
            shape = (asked[-1].index + 1, 16, 32)
            features = [None, None] if tower is None else [random_tokens(*shape, seed=seed) for seed in (0, 1)]
            first, second = (answer(model, tokenizer, asked, some, 0 if tower is None else 16) for some in features)
            assert (first == second) == (variant == "none")
            if variant == "patches":
                alone = answer(model, tokenizer, asked, features[0], 16, batch_size=1)
                assert alone == first

    def test_prompts_are_the_beginning_of_what_was_trained(self):
        tokenizer = Parts(SETTINGS).tokenizer()
        (messages,) = scene_conversations("plain", [0], with_images=True)
        whole = encode_conversation(tokenizer, messages, image_seq_length=3).input_ids
        content = messages[0].text.replace("<image>", "<image>" * 3)
        prompts = encode_prompts(tokenizer, [content, content + " And what else?"])["input_ids"]
        start = prompts[0][prompts[0] != tokenizer.pad_token_id].tolist()
        assert whole[: len(start)] == start
        assert prompts[0, 0] == tokenizer.pad_token_id  # on the left


def test_runs_try_what_a_variant_has():
    runs = plan_runs(["pooled", "ours-4", "none"], [0, 1], [1e-3, 3e-3], [-2, -1])
    assert len(runs) == len({run.name for run in runs}) == 8 + 4 + 2
    assert {run.layer for run in runs if run.variant != "pooled"} == {None}


def make_row(variant, seed, loss, accuracy, **changes):
    row = {"variant": variant, "seed": seed, "validation_loss": loss, "teacher_layer": "", "tokens_per_image": 49}
    row |= {"projector_learning_rate": 0.001, "training_s": 60.0, "accuracy_mean": accuracy}
    row |= {f"accuracy_{kind}": accuracy for kind in ("color", "shape", "size", "count", "existence", "position")}
    row |= {"accuracy_relation": 0.25, "accuracy_comparison": "", "accuracy_description": 0.0}
    return row | changes


def make_cost(variant, layer="", **changes):
    row = {"variant": variant, "teacher_layer": layer, "answer_memory_gib": 0.5, "train_step_ms": 20}
    row |= {f"{what}_ms_{batch}": 1.234 for what in ("encoder", "first_token") for batch in (1, 64)}
    return row | {"train_step_memory_gib": ""} | changes


def test_the_table_shows_means_ranges_and_the_choice_of_the_lower_loss():
    rows = [
        make_row("none", 0, 1.0, 0.4, tokens_per_image=0),
        make_row("ours-49", 0, 0.3, 0.96),
        make_row("ours-49", 1, 0.4, 0.98),
        make_row("ours-25", 0, 0.6, 0.9, tokens_per_image=25),
        make_row("pooled", 0, 0.5, 0.80, teacher_layer=-2),
        make_row("pooled", 0, 0.4, 0.70, teacher_layer=-1),
    ]
    costs = [
        make_cost("none", encoder_ms_1="", encoder_ms_64=""),
        make_cost("ours-49", train_step_ms=90),  # measured again below
        make_cost("ours-49"),
        make_cost("pooled", -2, train_step_ms=30),
        make_cost("pooled", -1, train_step_ms=40),
    ]
    from_file = ([{name: str(value) for name, value in row.items()} for row in kind] for kind in (rows, costs))
    table = markdown_table(rows, costs)
    assert markdown_table(*from_file) == table
    _, _, pooled, ours_25, ours_49, none = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table.split("\n")
    )
    assert pooled[:3] == ["teacher patches, 2x2 averaged, layer -1", "49", "70.0 (70.0 to 70.0; 1)"]
    assert pooled[15] == "40"
    assert ours_25[:2] == ["ours", "25"] and ours_25[12:] == ["- / -", "- / -", "-", "-", "-", "60"]
    assert ours_49[:4] == ["ours", "49", "97.0 (96.0 to 98.0; 2)", "97.0"]
    assert ours_49[9:] == ["25.0", "-", "0.0", "1.23 / 1.23", "1.23 / 1.23", "0.5", "20", "-", "60"]
    assert (none[0], none[12]) == ("no image", "- / -")


def test_the_rehearsal_runs_resumes_and_ends_in_rows(tmp_path, capsys):
    out = tmp_path / "out"
    common = ["--size", "tiny", "--out", str(out), "--device", "cpu", "--steps", "1", "--variants"]
    assert main(["train", *common, "resampler", "none", "--seeds", "0"]) == 0
    first = {file: file.stat().st_mtime_ns for file in (out / "runs").glob("*.json")}
    assert len(first) == 2
    assert main(["train", *common, "resampler", "ours-4", "--seeds", "0"]) == 0
    assert {file: file.stat().st_mtime_ns for file in first} == first  # finished runs are not run again
    speed = ["--variants", "resampler", "none", "--repeats", "1", "--device", "cpu"]
    assert main(["speed", "--out", str(out), *speed]) == 0
    capsys.readouterr()
    assert main(["table", str(out), "--rows", str(tmp_path / "rows")]) == 0
    table = capsys.readouterr().out
    assert "| teacher patches, resampler, layer -2 | 4 |" in table
    assert main(["table", str(tmp_path / "rows")]) == 0
    assert capsys.readouterr().out == table
    assert main(["table", str(tmp_path / "rows"), "--rows", str(tmp_path / "rows")]) == 2
    assert "all of this is kept already" in capsys.readouterr().err
    shutil.rmtree(out / "runs")  # costs of another folder, to runs that are kept
    assert main(["table", str(out), "--rows", str(tmp_path / "rows")]) == 2
    assert "No run is finished" in capsys.readouterr().err
    assert main(["table", str(tmp_path / "rows"), str(out), "--rows", str(tmp_path / "rows")]) == 0
    assert capsys.readouterr().out == table
    with (tmp_path / "rows" / "compare_speed.csv").open(newline="") as file:
        assert [row["variant"] for row in csv.DictReader(file)].count("resampler") == 2
    rows, costs = {}, {}
    for name, found in (("compare_encoders", rows), ("compare_speed", costs)):
        with (tmp_path / "rows" / f"{name}.csv").open(newline="") as file:
            found |= {row["variant"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {"resampler", "ours-4", "none"}
    assert [rows[name]["tokens_per_image"] for name in rows] == [{"none": "0"}.get(name, "4") for name in rows]
    assert costs.keys() == {"resampler", "none"}
    assert float(costs["resampler"]["encoder_ms_64"]) > 0 and float(costs["resampler"]["train_step_ms"]) > 0
    assert costs["none"]["encoder_ms_1"] == "" and float(costs["none"]["first_token_ms_1"]) > 0
    for found, protocol, measured in (
        (rows, "compare-encoders-1", ("validation_loss", "training_s")),
        (costs, "compare-speed-2", ("first_token_ms_64",)),
    ):
        for row in found.values():
            assert row["protocol"] == protocol and row["outcome"] == "complete"
            assert all(row[column] for column in ("device", "torch", "date", "command", "max_length", *measured))


@pytest.mark.parametrize("variant", ["pooled", "ours-4", "none"])
def test_every_variant_can_be_recorded(variant, monkeypatch):
    """As `speed` does on a CUDA device."""
    parts = Parts(SETTINGS)
    tower = parts.tower(variant, -2)
    decoder, tokenizer = parts.decoder()
    peer = parts.peer(variant, tower, decoder)
    model = join_llava(None if tower is None else tower.module, peer, decoder, tokenizer).eval()
    inputs = dict(encode_prompts(tokenizer, [IMAGE_TOKEN * peer.num_tokens + "\nWhat is this?"] * 2))
    inputs.pop("token_type_ids", None)
    if tower is not None:
        inputs["pixel_values"] = torch.rand(2, 3, parts.image_size, parts.image_size)
    expected = model.generate(**inputs, generation_config=generation_config(3))[:, -3:]
    monkeypatch.setattr("sf_mllm.inference.replay.choose_kernels", lambda name, device: "torch")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # a tape cannot hold what is compiled
    replay = Replay(model, recorder := TapeRecorder(), compiled=True)
    for _ in range(4):
        answer = model.generate(**replay.prepare(inputs, 3), generation_config=generation_config(3))[:, -3:]
        assert torch.equal(answer, expected)
    assert recorder.recorded == (2 if variant == "none" else 3)  # image, prompt, further tokens
    replay.close()


def test_a_table_checks_all_settings_that_runs_share():
    assert {*_SHARED, "encoders"} == {field.name for field in fields(Settings)}


def test_variants_in_processes_of_their_own(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--size", "tiny", "--out", str(out), "--device", "cpu", "--steps", "1", "--seeds", "0"]
    assert main(["train", *arguments, "--variants", "none", "--parallel", "2"]) == 0
    assert "none: complete" in capsys.readouterr().out
    assert json.loads((out / "runs/none-rate0.001-seed0.json").read_text())["parallel"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--out", "X", "--size", "tiny", "--variants", "poled"], "Did you mean 'pooled'?"),
        (["train", "--out", "X", "--steps", "0"], "--steps 0 is not possible"),
        (["train", "--out", "X", "--size", "tiny", "--batch-size", "49"], "--scenes 48 do not fill a batch of 49"),
        (["train", "--out", "X", "--seeds", "1", "1"], "--seeds holds a value twice"),
        (["train", "--out", "X", "--teacher-layer", "0"], "--teacher-layer 0 is not possible"),
        (
            ["train", "--out", "X", "--size", "tiny", "--encoders", "a", "b"],
            "ours-4, ours-4; give encoders of different",
        ),
        (["train", "--out", "USED", "--size", "tiny", "--steps", "9"], "other settings (different: steps)"),
        (["speed", "--out", "X"], "holds no comparison"),
        (["speed", "--out", "X", "--repeats", "0"], "--repeats 0 is not possible"),
        (["speed", "--out", "USED", "--compile", "--device", "cpu"], "--compile is for a CUDA device here, got cpu"),
        (["table", "X"], "holds no comparison"),
        (["table", "USED"], "No run is finished"),
    ],
)
def test_bad_input_is_refused_in_one_line(tmp_path, capsys, arguments, message):
    used = tmp_path / "USED"
    used.mkdir()
    settings = {"encoders": ["demo:sf_llava"], "teacher": "demo:clip", "decoder": "demo:decoder", "domain": "plain"}
    settings |= {"size": "tiny", "learning_rate": 1e-3, **SIZES["tiny"]}
    (used / "settings.json").write_text(json.dumps(settings))
    places = {name: str(tmp_path / name) for name in ("X", "USED")}
    assert main([places.get(argument, argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not Path(places["X"]).exists()
