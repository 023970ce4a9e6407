"""Prefixes kept over epochs: known by content, within a budget; batches that hold a picture's questions together."""

import json
import logging
from collections import Counter

import datasets
import pytest
import torch
from family import IMAGE, SAMPLES, Sample
from PIL import Image
from processors import tiny_llava_model, tiny_llava_processor
from transformers import DynamicCache, TrainingArguments
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from zoo import FAMILIES, intervention

import vlreft
from vlreft.reuse.grouping import ImageGroups, image_keys
from vlreft.reuse.kept import KeptPrefixes, cache_of, media_of_rows, rows_of, shell_of
from vlreft.reuse.prefix import PrefixReuse

QUESTIONS = ("what is it", "is it a circle", "how many are there")
MEMORY_OR_DISK = pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])


# The store -----------------------------------------------------------------------------------------------------------


def prefix_of(number, num_bytes=400):
    return [torch.full((1, 1, num_bytes // 8, 1), float(number)), torch.full((1, 1, num_bytes // 8, 1), -float(number))]


@MEMORY_OR_DISK
def test_the_longest_unused_goes_first(tmp_path, on_disk):
    kept = KeptPrefixes(5000, tmp_path if on_disk else None)  # a file has a head of about 150 bytes
    for number in range(8):
        kept.put(str(number), prefix_of(number))
        found = kept.get("0")  # in use all the time
        assert found is not None
        assert found[0].equal(prefix_of(0)[0])
    for number in range(8, 20):
        kept.put(str(number), prefix_of(number))
        assert kept.get("0") is not None
        assert kept.num_bytes <= 5000
    there = [number for number in range(20) if kept.store.get(str(number)) is not None]
    assert there == [0, *range(min(there[1:]), 20)]
    assert 5 <= len(there) < 13
    assert kept.num_hits == 20
    assert kept.get("none") is None
    assert kept.num_misses == 1


def test_says_how_many_fit(caplog):
    with caplog.at_level(logging.INFO, "vlreft"):
        kept = KeptPrefixes("1MB")
        kept.put("a", prefix_of(1, 10_000))
        kept.put("b", prefix_of(2, 10_000))
        kept.put("c", prefix_of(3, 2_000_000))
    assert caplog.messages == [
        "a kept prefix takes 10 kB; 1 MB hold 100",
        "a prefix of 2 MB is larger than `keep_prefixes`, and not kept",
    ]
    assert kept.get("a") is not None
    assert kept.get("c") is None
    with pytest.raises(ValueError, match=r"less than a single prefix takes, 2 MB"):
        KeptPrefixes("1MB").put("a", prefix_of(1, 2_000_000))


def test_what_is_kept_is_a_copy():
    kept, row = KeptPrefixes("1MB"), prefix_of(1)
    kept.put("a", row)
    row[0].zero_()
    found = kept.get("a")
    assert found is not None
    assert found[0].equal(prefix_of(1)[0])


def test_files_go_with_their_trainer(tmp_path):
    first, second = KeptPrefixes("1MB", tmp_path), KeptPrefixes("1MB", tmp_path)
    first.put("a", prefix_of(1))
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 1
    assert second.get("a") is None
    del first
    assert list(tmp_path.glob("*/*.safetensors")) == []


@pytest.mark.parametrize("budget", ["lots", "2 XB", 0, -5, "", True, "0GB"])
def test_budgets_that_are_none(budget):
    with pytest.raises(ValueError, match=r"`keep_prefixes` .*must be a number of bytes, or a text such as '2GB'"):
        KeptPrefixes(budget)


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"`keep_prefixes_in` .*cannot be written to"):
        KeptPrefixes("1MB", tmp_path / "file" / "below")


# A cache, row by row -------------------------------------------------------------------------------------------------


def test_rows_of_a_cache_come_back():
    """Three rows of 7, 3 and 0 tokens, in front of which are pads; one layer forgets all but the last four tokens."""
    cache = DynamicCache()
    cache.layers = [DynamicLayer(), DynamicSlidingWindowLayer(sliding_window=5)]
    keys, values = torch.randn(2, 2, 3, 2, 7, 4).unbind(0)
    for number in range(2):
        cache.update(keys[number], values[number], number)
    rows = rows_of(cache, [7, 3, 0])
    shell = shell_of(cache)
    assert [tuple(part.shape) for part in rows[0]] == [(1, 2, 7, 4)] * 2 + [(1, 2, 4, 4)] * 2
    assert [tuple(part.shape) for part in rows[1]] == [(1, 2, 3, 4)] * 4
    built = cache_of(shell, [rows[1], None, rows[0], rows[1]], 7)
    assert built.get_seq_length(0) == built.get_seq_length(1) == 7
    for number, held in ((0, 7), (1, 4)):
        layer = built.layers[number]
        assert layer.keys.shape == (4, 2, held, 4)
        assert layer.keys[2].equal(keys[number][0][:, -held:])
        assert layer.values[0][:, -3:].equal(values[number][1][:, -3:])
        assert layer.values[3].equal(layer.values[0])
        assert not layer.keys[0][:, :-3].any()
        assert not layer.keys[1].any()
    built.update(keys[0][:1].expand(4, -1, -1, -1), values[0][:1].expand(4, -1, -1, -1), 1)
    assert built.get_seq_length(1) == 14
    assert shell.get_seq_length(0) == 0


@pytest.mark.parametrize(
    ("media", "num_tokens", "wanted"),
    [
        ({"pixel_values": torch.zeros(2, 3, 4, 4)}, [4, 0, 4], [1, 0, 1]),
        ({"pixel_values": torch.zeros(3, 3, 4, 4)}, [4, 0, 8], [1, 0, 2]),
        ({"pixel_values": torch.zeros(4, 3, 4, 4)}, [4, 0, 0, 8], None),  # 12 tokens are no four pictures of one size
        ({"pixel_values": torch.zeros(3, 1, 3, 4, 4)}, [4, 0, 8], None),  # each row's pictures in a row of their own?
        ({"pixel_values": torch.zeros(4, 3, 4, 4)}, [0, 0, 8, 8], None),  # a black one for rows without?
        ({"pixel_values": torch.zeros(24, 9), "grid": torch.tensor([[1, 2, 4], [1, 4, 4]])}, [2, 4], [1, 1]),
        (
            {"pixel_values": torch.zeros(40, 9), "grid": torch.tensor([[1, 2, 4], [1, 4, 4], [1, 4, 4]])},
            [6, 0, 4],
            [2, 0, 1],
        ),
        (
            {"pixel_values": torch.zeros(40, 9), "grid": torch.tensor([[1, 2, 4], [1, 4, 4], [1, 4, 4]])},
            [6, 4],
            [2, 1],
        ),
        ({"pixel_values": torch.zeros(2, 3, 4, 4), "sizes": [[4, 4], [4, 4]]}, [4, 4], None),
        ({}, [0, 0], [0, 0]),
    ],
)
def test_whose_pictures_are_whose(media, num_tokens, wanted):
    rows = media_of_rows(media, num_tokens)
    assert (rows if rows is None else list(map(len, rows))) == wanted


# Content -------------------------------------------------------------------------------------------------------------


def step(reuse, batch):
    """Take a step; return its gradients and how many prefixes it ran."""
    model, before = reuse.reft.model, reuse.num_run
    model.zero_grad()
    with reuse.cut(batch) as rest:
        model(**rest).loss.backward()
    return [p.grad.clone() for p in reuse.reft.parameters()], reuse.num_run - before


@MEMORY_OR_DISK
def test_prefixes_are_known_by_content(attached, tmp_path, on_disk):
    family = FAMILIES["llava"]
    model, reft = attached(family, intervention("loreft", positions="question:l2", layers="all"))
    model.train()
    reuse = PrefixReuse(reft, required=True, kept=KeptPrefixes("1GB", tmp_path if on_disk else None))
    batch = family.batch([SAMPLES[0], Sample((6, 17, IMAGE, 18, 9), (22, 23, 24))])
    step(reuse, batch)
    _, num_run = step(reuse, batch)
    assert num_run == 0
    fresh, _ = step(PrefixReuse(reft, required=True), batch)
    found, _ = step(reuse, batch)
    for ours, theirs in zip(found, fresh, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    swapped = {name: value.flip(0) for name, value in batch.items()}
    assert step(reuse, swapped)[1] == 0
    for name, place in (("pixel_values", (0, 0, 3, 3)), ("input_ids", (0, 1))):
        other = {**batch, name: batch[name].clone()}
        other[name][place] += 1
        expected, _ = step(PrefixReuse(reft, required=True), other)
        got, num_run = step(reuse, other)
        assert num_run == 1
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert step(reuse, batch)[1] == 0
    weight = model.get_submodule(family.text)[0].mlp.up_proj.weight
    with torch.no_grad():
        before = weight.clone()
        weight.mul_(1.5)
    expected, _ = step(PrefixReuse(reft, required=True), batch)
    got, num_run = step(reuse, batch)
    assert num_run == 2  # the base is another one
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        weight.copy_(before)
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("fused", [False, True])
def test_a_trained_base_is_another_base(attached, fused):
    """Fused optimizers write without torch's count of writes."""
    family = FAMILIES["llava"]
    model, reft = attached(family, intervention("loreft", positions="question:l2", layers="all"))
    model.train()
    reuse, batch = PrefixReuse(reft, required=True, kept=KeptPrefixes("1GB")), family.batch([SAMPLES[0]])
    weight = model.get_submodule(family.text)[0].mlp.up_proj.weight
    before = weight.detach().clone()
    step(reuse, batch)
    assert step(reuse, batch)[1] == 0
    weight.requires_grad_(True)
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], fused=fused).step()
    weight.requires_grad_(False)
    assert step(reuse, batch)[1] == 1
    with torch.no_grad():
        weight.copy_(before)
    weight.grad = None
    model.zero_grad(set_to_none=True)


def test_dropout_forbids_to_keep(attached):
    family = FAMILIES["llava"]
    model, reft = attached(family, intervention("loreft", positions="question:l2", layers="all"))
    model.train()
    blocks = [block.self_attn for block in model.get_submodule(family.text)]
    for attention in blocks:
        attention.attention_dropout = 0.5
    batch = family.batch([SAMPLES[0]] * 2)
    with pytest.raises(ValueError, match=r"`keep_prefixes` is not possible: .*dropout"):
        step(PrefixReuse(reft, required=True, kept=KeptPrefixes("1GB")), batch)
    assert step(PrefixReuse(reft, required=True), batch)[1] >= 2  # each row draws its own
    for attention in blocks:
        attention.attention_dropout = 0.0
    model.zero_grad(set_to_none=True)


def test_a_long_way_between_runs_without_a_graph_too(attached):
    """Questions of 20 tokens, of which two are edited: kept up to the picture, no graph for the others."""
    family = FAMILIES["llava"]
    model, reft = attached(family, intervention("loreft", positions="prompt:l2", layers="all"))
    model.double().train()
    samples = [Sample((5, 8, IMAGE, *range(10, 28 + more)), (20, 21)) for more in range(2)]
    batch = family.batch([Sample((5, 8, *s.prompt[2:]), s.answer) for s in samples])
    batch["pixel_values"] = batch["pixel_values"].double()
    model.zero_grad()
    model(**batch).loss.backward()
    plain = [p.grad.clone() for p in reft.parameters()]
    kept = KeptPrefixes("1GB")
    reuse = PrefixReuse(reft, required=True, kept=kept)
    for _ in range(2):
        ours, _ = step(reuse, batch)
        for one, other in zip(ours, plain, strict=True):
            assert (one - other).norm() <= 1e-6 * other.norm()
    with reuse.cut(batch) as rest:
        assert rest["input_ids"].shape[1] == 2 + 2 + 1  # one row has a token more
    assert len(kept.store.kept) == 1  # of both questions
    model.float().zero_grad(set_to_none=True)


# Training ------------------------------------------------------------------------------------------------------------


def rows_about(num_pictures, questions=QUESTIONS):
    pictures = [Image.new("RGB", (84, 84), (20 * i, 0, 9)) for i in range(num_pictures)]
    return [
        {"image": picture, "image_id": i, "question": question, "answer": "ab" * (1 + (i + j) % 3)}
        for j, question in enumerate(questions)
        for i, picture in enumerate(pictures)
    ]


def trained(folder, rows=None, steps=6, **parts):
    processor = tiny_llava_processor(image_size=84)  # 36 image tokens
    model = tiny_llava_model(processor)
    torch.manual_seed(0)
    edit = intervention("loreft", positions="question:l3", init="reference")
    reft = vlreft.attach(model, vlreft.ReftConfig(edit))
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=3, learning_rate=1e-2, use_cpu=True,
        report_to="none", save_strategy=parts.pop("save_strategy", "no"), save_steps=2, disable_tqdm=True,
        gradient_accumulation_steps=parts.pop("accumulate", 1),
    )  # fmt: skip
    trainer = vlreft.ReftTrainer(
        model, arguments, vlreft.Collator(processor), rows_about(2) if rows is None else rows, **parts
    )
    return trainer, reft


@pytest.mark.parametrize("accumulate", [1, 2])
@MEMORY_OR_DISK
def test_training_with_kept_prefixes_learns_the_same(tmp_path, on_disk, accumulate, caplog):
    plain, plain_reft = trained(tmp_path, reuse_prefix=False, group_by_image=True, accumulate=accumulate)
    plain.train()
    where = {"keep_prefixes_in": tmp_path / "kept"} if on_disk else {}
    with caplog.at_level(logging.INFO, "vlreft"):
        ours, reft = trained(
            tmp_path, keep_prefixes="1GB", group_by_image=True, accumulate=accumulate, reuse_prefix=True, **where
        )
        ours.train()
    assert "a kept prefix takes " in caplog.text
    for one, other in zip(reft.parameters(), plain_reft.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    kept = ours._kept
    assert kept.num_misses == 2  # pictures
    assert kept.num_hits >= 6 * accumulate - 2


def test_a_store_serves_one_training_after_another(tmp_path):
    """Another adapter on the same base, edited elsewhere, finds what the first one's training has kept."""
    store = vlreft.KeptPrefixes("1GB")
    first, reft = trained(tmp_path, keep_prefixes=store, group_by_image=True)
    first.train()
    assert store.num_misses == 2  # pictures
    model = reft.model
    reft.detach()
    learned = []
    for kept in (store, None):
        torch.manual_seed(0)
        edit = intervention("loreft", positions="question:l1", init="reference")
        reft = vlreft.attach(model, vlreft.ReftConfig(edit))
        trainer = vlreft.ReftTrainer(
            model, first.args, first.data_collator, rows_about(2), keep_prefixes=kept, group_by_image=True
        )
        trainer.train()
        learned.append([parameter.detach().clone() for parameter in reft.parameters()])
        reft.detach()
    assert store.num_misses <= 2 + 1  # how a cache is built is seen on one row
    for one, other in zip(*learned, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_store_that_need_not_be_used(tmp_path):
    store = vlreft.KeptPrefixes("1GB", required=False)
    trainer, reft = trained(tmp_path, keep_prefixes=store, steps=1)
    model = reft.model
    reft.detach()
    vlreft.attach(model, vlreft.ReftConfig(intervention("loreft", site="vision", positions="patches")))
    for required in (False, True):
        store.required = required
        again = vlreft.ReftTrainer(model, trainer.args, trainer.data_collator, rows_about(1), keep_prefixes=store)
        if required:
            with pytest.raises(ValueError, match="`keep_prefixes` is not possible"):
                again.train()
        else:
            again.train()
    assert not store.num_misses
    with pytest.raises(ValueError, match="has its own folder"):
        trained(tmp_path, keep_prefixes=store, keep_prefixes_in=tmp_path / "kept")


def test_a_budget_below_a_single_prefix(tmp_path):
    trainer, _ = trained(tmp_path, keep_prefixes="1kB")
    with pytest.raises(ValueError, match=r"^`keep_prefixes` \(=1000 bytes\) is less than a single prefix takes, "):
        trainer.train()


def test_a_config_that_leaves_no_prefix_keeps_none(tmp_path):
    processor = tiny_llava_processor()
    model = tiny_llava_model(processor)
    vlreft.attach(model, vlreft.ReftConfig(intervention("loreft", site="vision", positions="patches")))
    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True)
    collator = vlreft.Collator(processor)
    trainer = vlreft.ReftTrainer(model, arguments, collator, rows_about(1), keep_prefixes="1GB")
    with pytest.raises(ValueError, match=r"`keep_prefixes` is not possible: intervention 0 .*; leave it out"):
        trainer.train()


def test_settings_that_clash(tmp_path):
    with pytest.raises(ValueError, match="`reuse_prefix` reuses, which is off"):
        trained(tmp_path, keep_prefixes="1GB", reuse_prefix=False)
    with pytest.raises(ValueError, match="`keep_prefixes_in` says where, `keep_prefixes` how much"):
        trained(tmp_path, keep_prefixes_in=tmp_path)
    with pytest.raises(ValueError, match=r"`keep_prefixes` .*must be a number of bytes"):
        trained(tmp_path, keep_prefixes="much")


# Grouping ------------------------------------------------------------------------------------------------------------


def in_batches(places, size):
    places = list(places)
    return [places[start : start + size] for start in range(0, len(places), size)]


def test_a_pictures_rows_come_together_and_nothing_is_lost():
    keys = [number % 40 for number in range(200)]
    groups = ImageGroups(keys, 5, seed=0, epoch=lambda: 0)
    order = list(groups)
    assert len(groups) == 200
    assert sorted(order) == list(range(200))
    assert all(len({keys[place] for place in batch}) == 1 for batch in in_batches(order, 5))
    pictures = [keys[batch[0]] for batch in in_batches(order, 5)]
    assert pictures != sorted(pictures)
    assert any(batch != sorted(batch) for batch in in_batches(order, 5))


def test_pictures_fill_batches_up_where_they_can():
    keys = [f"big {i // 3}" for i in range(60)] + [f"small {i}" for i in range(20)] + [None] * 20
    order = list(ImageGroups(keys, 4, seed=3, epoch=lambda: 0))
    assert sorted(order) == list(range(100))
    spread = Counter(key for batch in in_batches(order, 4) for key in {keys[place] for place in batch} if key)
    assert all(spread[f"big {i}"] == 1 for i in range(20))


def test_order_follows_seed_and_epoch():
    keys = [number // 3 for number in range(60)]
    epoch = 0
    orders = {(seed, e): list(ImageGroups(keys, 4, seed=seed, epoch=lambda e=e: e)) for seed in (0, 1) for e in (0, 1)}
    assert len({tuple(order) for order in orders.values()}) == 4
    assert list(ImageGroups(keys, 4, seed=0, epoch=lambda: epoch)) == orders[0, 0]


class WatchedCollator(vlreft.Collator):
    """A collator that notes which rows it was given."""

    def __init__(self, processor):
        super().__init__(processor)
        self.seen = []

    def __call__(self, examples):
        self.seen.append([(row["image_id"], row["question"]) for row in examples])
        return super().__call__(examples)


def watched(folder, **parts):
    trainer, _ = trained(folder, rows=rows_about(4), steps=8, group_by_image=True, **parts)
    trainer.data_collator = WatchedCollator(trainer.data_collator.processor)
    return trainer


def test_the_trainer_groups_and_resumes_in_the_same_order(tmp_path):
    whole = watched(tmp_path, save_strategy="steps")
    whole.train()
    seen = whole.data_collator.seen[:8]
    assert all(len({image_id for image_id, _ in batch}) == 1 for batch in seen)
    assert [b[0][0] for b in seen[:4]] != [b[0][0] for b in seen[4:]]
    assert sorted(row for batch in seen[:4] for row in batch) == sorted(row for batch in seen[4:8] for row in batch)
    for step_number in (2, 6):  # in the middle of the first epoch, and of the second
        state = json.loads((tmp_path / f"checkpoint-{step_number}" / "trainer_state.json").read_text())
        assert state["global_step"] == step_number
        resumed = watched(tmp_path / "again")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step_number}"))
        assert resumed.data_collator.seen[: 8 - step_number] == seen[step_number:]
        for one, other in zip(resumed.reft.parameters(), whole.reft.parameters(), strict=True):
            torch.testing.assert_close(one, other)


def test_evaluation_runs_a_picture_once_for_the_rows_that_follow_one_another(tmp_path):
    plain, _ = trained(tmp_path / "plain", group_by_image=False)
    grouped, reft = trained(tmp_path / "grouped", group_by_image=True)
    rows = sorted(rows_about(3), key=lambda row: row["image_id"])
    pictures = []
    tower = reft.model.model.vision_tower
    handle = tower.register_forward_hook(lambda _tower, inputs, _output: pictures.append(len(inputs[0])))
    answers = []
    for trainer in (plain, grouped):
        trainer.generation = {"max_new_tokens": 4, "do_sample": False}
        trainer.args.per_device_eval_batch_size = 2 * len(QUESTIONS)
        answers.append(trainer.predict_answers(rows))
    handle.remove()
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 1
    # Two pictures, then one; and one more, where it is tried once that this is exact.
    assert sum(pictures) == 3 + 1


def test_pictures_are_known_by_id_or_path(tmp_path):
    paths = [str(tmp_path / f"{i}.png") for i in range(2)]
    for path in paths:
        Image.new("RGB", (4, 4)).save(path)
    rows = [{"image": path, "question": "q"} for path in (*paths, paths[0])]
    assert image_keys(rows) == [(paths[0],), (paths[1],), (paths[0],)]
    files = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    assert image_keys(files) == [*paths, paths[0]]
    assert image_keys(datasets.Dataset.from_list(rows)) == [(paths[0],), (paths[1],), (paths[0],)]
    numbered = [{**row, "image_id": number} for row, number in zip(rows, (7, 8, 7), strict=True)]
    assert image_keys(numbered) == image_keys(datasets.Dataset.from_list(numbered)) == [7, 8, 7]
    several = [{"images": paths, "question": "q"}, {"images": paths[:1], "question": "q"}, {"question": "q"}]
    assert image_keys(several) == [tuple(paths), (paths[0],), None]
    assert image_keys(datasets.Dataset.from_list(several[:2])) == [tuple(paths), (paths[0],)]


@pytest.mark.parametrize(
    ("dataset", "reason"),
    [
        (
            [{"image": Image.new("RGB", (4, 4)), "question": "q"}],
            r"row 0 has no `image_id`, and its picture is no path",
        ),
        ([{"question": "q"}], "found no row with an image among 1; give each row an `image_id`"),
        (datasets.Dataset.from_list([{"question": "q"}]), r"needs a column `image_id` or `image`, got \['question'\]"),
        (
            datasets.Dataset.from_list([{"image": Image.new("RGB", (4, 4))}]),
            "row 0 holds its picture itself, not the path of a file",
        ),
        (range(4), "needs a datasets.Dataset or a list of rows.*got a range"),
        ([4], "row 0 is a int"),
    ],
)
def test_rows_that_do_not_say_which_picture_they_show(dataset, reason):
    with pytest.raises(ValueError, match=reason):
        image_keys(dataset)


def test_grouping_takes_no_second_order(tmp_path):
    trainer, _ = trained(tmp_path, group_by_image=True)
    trainer.args.train_sampling_strategy = "group_by_length"
    with pytest.raises(ValueError, match="`group_by_image` is an order of its own"):
        trainer.train()
