"""Laws of what breaks: killed processes, full disks, losses that are no numbers, dead workers, Ctrl-C."""

import json
import logging
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from crash_worker import rows, trainer_in
from tiny import llama, numbers, shake
from transformers import TrainerCallback

import vlreft
from vlreft.saving.checkpoint import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME
from vlreft.training.folders import REPLACED, STAGING, last_checkpoint, put_back
from vlreft.training.watch import COLLATING, COUNT, DOING, PID, WatchedRows

ROOT = Path(__file__).parent.parent
CONFIG = vlreft.ReftConfig(vlreft.Intervention("loreft", positions="f2+l2", rank=2))
OTHER = vlreft.ReftConfig(vlreft.Intervention("red", positions="f1"))


def in_a_fork(function, *args):
    """Run a function in a forked process; return its exit code, and the type and text of what it raised."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code, told = 1, ["nothing", ""]
        try:
            function(*args)
            code = 0
        finally:
            if error := sys.exc_info()[1]:
                told = [type(error).__name__, f"{error} {' '.join(getattr(error, '__notes__', ()))}"]
                code = error.code if isinstance(error, SystemExit) else 1
            os.write(write, json.dumps(told).encode())
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as file:
        told = file.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, *json.loads(told or '["", ""]')


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def whole_run(folder, **options):
    trainer = trainer_in(folder, **options)
    trainer.train()
    return numbers(trainer.reft)


def resumed(folder, **options):
    torch.manual_seed(99)
    trainer = trainer_in(folder, **options)
    trainer.train(resume_from_checkpoint=True)
    return numbers(trainer.reft)


def names(folder):
    return {path.name for path in folder.iterdir()}


class AtStep(TrainerCallback):
    """Calls a function at the end of one step."""

    def __init__(self, step, function):
        self.step, self.function = step, function

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.function()


# The adapter's folder -------------------------------------------------------------------------------------------------


def saved(folder, config, seed):
    reft = shake(vlreft.attach(llama(), config), seed)
    reft.save_pretrained(folder)
    return numbers(reft)


def die_at(call, folder, config, seed):
    """Save an adapter and end the process without a word at the n-th flush or rename."""
    calls = iter(range(1000))

    def dying(function):
        def run(*args):
            if next(calls) == call:
                os._exit(9)
            return function(*args)

        return run

    os.fsync, Path.replace = dying(os.fsync), dying(Path.replace)
    saved(folder, config, seed)


@pytest.mark.parametrize("config", [CONFIG, OTHER], ids=["same config", "other config"])
@pytest.mark.parametrize("call", range(8))
def test_an_adapter_is_the_old_one_or_the_new_one(call, config, tmp_path):
    """Calls 0 to 2 are flushes, 3 to 5 renames, 6 the folder's flush; of two configs and two sets of numbers no mix."""
    old = saved(tmp_path, CONFIG, 1)
    code, *_ = in_a_fork(die_at, call, tmp_path, config, 2)
    assert code == (9 if call < 7 else 0)
    new = numbers(shake(vlreft.attach(llama(), config), 2))
    loaded = vlreft.load(llama(), tmp_path)
    assert loaded.config == (config if call > 3 else CONFIG)
    assert same(numbers(loaded), new if call > 3 else old)
    code, *_ = in_a_fork(die_at, 1, tmp_path, CONFIG, 3)  # once more, before the first save is cleared up
    assert code == 9
    loaded = vlreft.load(llama(), tmp_path)
    assert same(numbers(loaded), new if call > 3 else old)
    third = saved(tmp_path, CONFIG, 3)
    assert same(numbers(vlreft.load(llama(), tmp_path)), third)
    assert names(tmp_path) == {CONFIG_NAME, WEIGHTS_NAME, CARD_NAME}


def test_weights_of_another_save_are_refused(tmp_path):
    saved(tmp_path / "one", CONFIG, 1)
    saved(tmp_path / "two", CONFIG, 2)
    shutil.copy(tmp_path / "two" / WEIGHTS_NAME, tmp_path / "one" / WEIGHTS_NAME)
    with pytest.raises(ValueError, match=r"one/reft_model.safetensors is not the file that .* was saved with"):
        vlreft.load(llama(), tmp_path / "one")


def test_files_from_before_the_hash_are_read(tmp_path):
    before = saved(tmp_path, CONFIG, 1)
    data = json.loads((tmp_path / CONFIG_NAME).read_text())
    del data["weights"]
    (tmp_path / CONFIG_NAME).write_text(json.dumps(data))
    assert same(numbers(vlreft.load(llama(), tmp_path)), before)


# Checkpoints that are not whole ---------------------------------------------------------------------------------------


def cut(name, keep=0.5):
    def damage(folder):
        path = folder / name
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])

    return damage


def flip(name):
    def damage(folder):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 0xFF
        (folder / name).write_bytes(content)

    return damage


def remove(name):
    return lambda folder: (folder / name).unlink()


DAMAGES = {
    "empty folder": (lambda folder: [path.unlink() for path in folder.iterdir()], "there is no reft_config.json"),
    "adapter cut": (cut(WEIGHTS_NAME), "reft_model.safetensors is not a whole safetensors file"),
    "adapter damaged": (flip(WEIGHTS_NAME), "its sha256 differs"),
    "config cut": (cut(CONFIG_NAME), "reft_config.json is not JSON"),
    "state cut": (cut("trainer_state.json"), "trainer_state.json is not JSON"),
    "state of another kind": (lambda folder: (folder / "trainer_state.json").write_text("[]"), "does not say its step"),
    "no state": (remove("trainer_state.json"), "No such file.*trainer_state.json"),
    "moments cut": (cut("optimizer.pt"), "optimizer.pt is damaged: File is not a zip file"),
    "moments damaged": (flip("optimizer.pt"), "optimizer.pt is damaged"),
    "no moments": (remove("optimizer.pt"), r"it has no optimizer\*"),
    "no schedule": (remove("scheduler.pt"), r"it has no scheduler\*"),
    "random state cut to nothing": (cut("rng_state.pth", 0), "rng_state.pth is damaged: File is not a zip file"),
    "no random state": (remove("rng_state.pth"), r"it has no rng_state\*.pth"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One undisturbed run: its folder and its numbers."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, whole_run(folder, save_total_limit=None)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_half_checkpoint_is_skipped_and_says_why(name, whole, tmp_path, caplog):
    damage, reason = DAMAGES[name]
    for step in (33, 36):
        shutil.copytree(whole[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    damage(tmp_path / "checkpoint-36")
    with caplog.at_level(logging.WARNING, "vlreft"):
        assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-33")
    (record,) = [record for record in caplog.records if "is skipped" in record.getMessage()]
    assert f"{tmp_path / 'checkpoint-36'} is skipped" in record.getMessage()
    assert re.search(reason, record.getMessage())
    with pytest.raises(ValueError, match=f"training cannot go on from .*checkpoint-36: .*{reason}"):
        trainer_in(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-36"))


def test_training_goes_on_from_the_last_whole_checkpoint(whole, tmp_path):
    for step in (33, 36):
        shutil.copytree(whole[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    cut("optimizer.pt")(tmp_path / "checkpoint-36")
    assert same(resumed(tmp_path), whole[1])
    assert names(tmp_path) == {"checkpoint-39", "checkpoint-40"}


def test_a_run_that_came_to_its_end_trains_no_more(whole, tmp_path):
    """Killed after its last checkpoint. transformers 5.24 would train a step 41."""
    shutil.copytree(whole[0] / "checkpoint-40", tmp_path / "checkpoint-40")
    assert same(resumed(tmp_path), whole[1])
    assert names(tmp_path) == {"checkpoint-40"}


def test_nothing_to_resume_from_is_said(whole, tmp_path):
    with pytest.raises(ValueError, match=r"there is nothing to resume from in .*: no checkpoint$"):
        trainer_in(tmp_path).train(resume_from_checkpoint=True)
    shutil.copytree(whole[0] / "checkpoint-3", tmp_path / "checkpoint-3")
    remove("rng_state.pth")(tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match=r"no whole checkpoint: checkpoint-3 \(it has no rng_state"):
        trainer_in(tmp_path).train(resume_from_checkpoint=True)


def test_a_checkpoint_that_was_being_replaced_comes_back(whole, tmp_path):
    """A run over an old one's folder: killed between the old one's rename and the new one's."""
    shutil.copytree(whole[0] / "checkpoint-3", tmp_path / STAGING / f"{REPLACED}checkpoint-3")
    put_back(tmp_path)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    assert same(resumed(tmp_path), whole[1])


def test_a_checkpoint_of_the_same_step_is_replaced(whole, tmp_path):
    shutil.copytree(whole[0] / "checkpoint-3", tmp_path / "checkpoint-39")  # of something else
    assert same(whole_run(tmp_path), whole[1])
    assert same(
        numbers(vlreft.load(llama(), tmp_path / "checkpoint-39")),
        numbers(vlreft.load(llama(), whole[0] / "checkpoint-39")),
    )
    assert STAGING not in names(tmp_path)


# Killed ---------------------------------------------------------------------------------------------------------------


def started(*args, **environment):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, str(ROOT / "tests" / "crash_worker.py"), *map(str, args)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=ROOT)


def ended(process):
    output, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    return json.loads(output.splitlines()[-1])


def worker(*args):
    return ended(started(*args))


def check_kills(found, num_kills):
    assert len(found["kills"]) == num_kills
    for number, kill in enumerate(found["kills"]):
        assert kill["code"] == 0, (number, kill)
        assert kill["is_same"], (number, kill)
        assert kill["folders"] == ["checkpoint-39", "checkpoint-40"], (number, kill)


def train_and_die_at(call, folder):
    """Train, and end by SIGKILL at the n-th flush or rename."""
    calls = iter(range(10_000))

    def dying(function):
        def run(*args):
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)

        return run

    os.fsync, Path.replace = dying(os.fsync), dying(Path.replace)
    trainer_in(folder).train()


@pytest.mark.parametrize(("call", "left"), [(1, None), (27, 3), (40, 6)])
def test_killed_in_a_save_and_resumed_is_the_uninterrupted_run(call, left, whole, tmp_path):
    code, *_ = in_a_fork(train_and_die_at, call, tmp_path)
    assert code == -signal.SIGKILL
    assert (tmp_path / STAGING).exists()
    last = last_checkpoint(tmp_path)
    assert last == (None if left is None else str(tmp_path / f"checkpoint-{left}"))
    assert same(whole_run(tmp_path) if left is None else resumed(tmp_path), whole[1])
    assert names(tmp_path) == {"checkpoint-39", "checkpoint-40"}


def train_and_die_in_a_deletion(folder):
    """Train, and end by SIGKILL when the last but one checkpoint that goes is half gone."""
    rmtree = shutil.rmtree

    def dying(path, *args, **options):
        files = sorted(Path(path).rglob("*.safetensors"))
        if any("checkpoint-33" in str(file) for file in files):
            files[0].unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        rmtree(path, *args, **options)

    shutil.rmtree = dying
    trainer_in(folder).train()


def test_killed_in_a_deletion_keeps_the_newest_checkpoints(whole, tmp_path):
    code, *_ = in_a_fork(train_and_die_in_a_deletion, tmp_path)
    assert code == -signal.SIGKILL
    for path in tmp_path.glob("checkpoint-*/*.safetensors"):
        os.utime(path.parent, (1, 1))  # the half one is by far the youngest
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-39")
    assert same(resumed(tmp_path), whole[1])
    assert names(tmp_path) == {"checkpoint-39", "checkpoint-40"}


def test_a_checkpoint_that_cannot_be_deleted_stays_and_says_so(whole, tmp_path, monkeypatch, caplog):
    replace = Path.replace

    def refusing(path, target):
        if path == tmp_path / "checkpoint-6":
            raise PermissionError("not allowed")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", refusing)
    with caplog.at_level(logging.WARNING, "vlreft"):
        assert same(whole_run(tmp_path), whole[1])
    assert "checkpoint-6 is beyond `save_total_limit`, and cannot be deleted" in caplog.text
    assert names(tmp_path) == {"checkpoint-6", "checkpoint-39", "checkpoint-40"}


def test_killed_after_the_last_save_leaves_no_more_than_the_limit(whole, tmp_path):
    for step in (39, 40):
        shutil.copytree(whole[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    shutil.copytree(whole[0] / "checkpoint-3", tmp_path / "checkpoint-36")
    (tmp_path / STAGING).mkdir()
    assert same(resumed(tmp_path), whole[1])
    assert names(tmp_path) == {"checkpoint-39", "checkpoint-40"}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_20_random_moments_is_the_uninterrupted_run(seed, tmp_path):
    found = worker("kill", tmp_path, 20, seed)
    check_kills(found, 20)
    assert sum(kill["was_saving"] for kill in found["kills"]) >= 3
    assert len({kill["resumed_from"] for kill in found["kills"]}) >= 5


@pytest.mark.slow
def test_a_long_run_leaves_nothing_behind(tmp_path):
    """5,000 steps with 20 evaluations and checkpoints: memory flat, open files and hooks the same."""
    found = worker("soak", tmp_path, 5000)
    assert found["evaluations"] == 20
    assert found["folders"] == ["checkpoint-4750", "checkpoint-5000"]
    steps, memory, files, hooks = zip(*found["found"], strict=True)
    assert steps[-1] == 5000
    assert max(memory[1:]) - min(memory[1:]) < 8_000_000, memory
    assert len(set(files)) == len(set(hooks)) == 1, (files, hooks)


# Disks that are full, folders that are closed -------------------------------------------------------------------------


def train_within(folder, limit):
    """Train, and from step 5 on write no file of more than so many bytes."""

    def close():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    trainer_in(folder, parts={"callbacks": [AtStep(5, close)]}).train()


def biggest(folder, name):
    return (folder / "checkpoint-3" / name).stat().st_size


@pytest.mark.parametrize("name", [WEIGHTS_NAME, "optimizer.pt"])
def test_a_checkpoint_that_does_not_fit_is_told_plainly(name, whole, tmp_path):
    """A limit of the file size, at which writes fail as they do on a full disk, also inside of torch.save."""
    assert biggest(whole[0], WEIGHTS_NAME) < biggest(whole[0], "optimizer.pt")
    code, kind, text = in_a_fork(train_within, tmp_path, biggest(whole[0], name) - 100)
    assert (code, kind) == (1, "OSError")
    assert f"{tmp_path / 'checkpoint-6'} cannot be written: " in text
    assert ("File too large" if name == WEIGHTS_NAME else "not all of a file could be written") in text
    assert (
        "it needs about 4,824 bytes" in text
    )  # 3 layers x 2 parts x (2 x 2 x 16 + 2) numbers, their moments, in float32
    assert " are free" in text
    assert text.strip().endswith(f"the last good checkpoint is {tmp_path / 'checkpoint-3'}")
    assert names(tmp_path) == {"checkpoint-3"}
    assert same(resumed(tmp_path), whole[1])


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 128 kB, where one may be made."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    if os.getuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("only root may make a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_told_plainly(whole, small_disk):
    with pytest.raises(OSError, match="cannot be written") as caught:
        trainer_in(small_disk, save_total_limit=None).train()
    text = str(caught.value)
    last = last_checkpoint(small_disk)
    assert last is not None
    assert f"the last good checkpoint is {last}" in text
    assert "No space left on device" in text or "not all of a file could be written" in text
    assert STAGING not in names(small_disk)
    for path in small_disk.glob("checkpoint-*"):
        if str(path) != last:
            shutil.rmtree(path)
    assert same(resumed(small_disk, save_total_limit=1), whole[1])


def train_where_nothing_may_be_written(folder):
    os.seteuid(65534)
    trainer_in(folder).train()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_a_folder_that_may_not_be_written_is_told_plainly(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole[0] / "checkpoint-3", folder / "checkpoint-3")
    for path in (folder, *folder.absolute().parents):
        path.chmod(0o755) if path.is_relative_to(tmp_path.parent.parent.parent) else None
    code, kind, text = in_a_fork(train_where_nothing_may_be_written, folder)
    assert (code, kind) == (1, "PermissionError")
    assert f"{folder / 'checkpoint-3'} cannot be written: Permission denied" in text
    assert text.strip().endswith(f"the last good checkpoint is {folder / 'checkpoint-3'}")


def test_an_adapter_that_does_not_fit_is_told_plainly(tmp_path):
    before = saved(tmp_path, CONFIG, 1)

    def save_within():
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
        saved(tmp_path, CONFIG, 2)

    code, kind, text = in_a_fork(save_within)
    assert (code, kind) == (1, "OSError")
    assert f"the adapter cannot be saved in {tmp_path}: File too large; it needs " in text
    assert names(tmp_path) == {CONFIG_NAME, WEIGHTS_NAME, CARD_NAME}
    assert same(numbers(vlreft.load(llama(), tmp_path)), before)


# Losses that are no numbers -------------------------------------------------------------------------------------------

BAD = 17  # the sample that breaks its batch


def marked_rows(kind):
    """Rows that are known by their last token, which is their number and one."""
    given = [{name: [*ids[:-1], number + 1] for name, ids in row.items()} for number, row in enumerate(rows(28))]
    if kind == "list with ids":
        return [row | {"id": f"row {number}"} for number, row in enumerate(given)]
    return datasets.Dataset.from_list(given) if kind == "table" else given


class Breaking:
    """A loss that breaks for the batch with the bad sample, and keeps what it saw."""

    def __init__(self, how):
        self.how, self.seen = how, []

    def loss(self, outputs, labels, num_items_in_batch=None):
        marks = (labels[:, -1] - 1).tolist()
        self.seen.append(marks)
        loss = torch.nn.functional.cross_entropy(outputs.logits[:, 4:-1].flatten(0, 1), labels[:, 5:].flatten())
        if BAD not in marks:
            return loss
        if self.how == "gradient":  # its value is 0, its gradient 0 / 0
            return loss + torch.sqrt(outputs.logits.sum() * 0)
        return loss * float(self.how)


def breaking(folder, how, kind="list", **options):
    broken = Breaking(how)
    parts = {"train_dataset": marked_rows(kind), "compute_loss_func": broken.loss}
    return broken, trainer_in(folder, parts=parts, **({"save_steps": 2, "max_steps": 30} | options))


@pytest.mark.parametrize(("how", "kind"), [("nan", "list"), ("inf", "list with ids"), ("-inf", "table")])
def test_a_loss_that_is_no_number_names_its_samples(how, kind, tmp_path):
    broken, trainer = breaking(tmp_path, how, kind, logging_steps=10)
    after = []
    trainer.add_callback(Recorder(lambda: after.append(numbers(trainer.reft))))
    with pytest.raises(FloatingPointError, match=f"is {how}: samples ") as caught:
        trainer.train()
    text, step = str(caught.value), len(broken.seen)
    called = [f"{n} ('row {n}')" if kind == "list with ids" else str(n) for n in broken.seen[-1]]
    assert BAD in broken.seen[-1]
    assert f"the loss of step {step} is {how}: samples {', '.join(called)} of the training data" in text
    assert "learning_rate" in text
    good = (step - 1) // 2 * 2
    where = f"the last good checkpoint is {tmp_path / f'checkpoint-{good}'}" if good else "there is no checkpoint yet"
    assert where in text
    assert len(after) == step - 1  # nothing was learnt from the bad batch
    if after:
        assert same(numbers(trainer.reft), after[-1])


class Recorder(TrainerCallback):
    """Calls a function at the end of every step."""

    def __init__(self, function):
        self.function = function

    def on_step_end(self, args, state, control, **kwargs):
        self.function()


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_are_named_whatever_made_the_batch(workers, tmp_path):
    """With accumulated batches and worker processes, after resuming in the middle of an epoch, grouped or not."""
    options = {"gradient_accumulation_steps": 3, "dataloader_num_workers": workers, "save_steps": 1}
    options |= {"per_device_train_batch_size": 2, "seed": 11}
    broken, trainer = breaking(tmp_path, "nan", **options)
    with pytest.raises(FloatingPointError) as first:
        trainer.train()
    assert len(broken.seen) > 3, "choose a seed with which a step comes before it"
    again, trainer = breaking(tmp_path, "nan", **options)
    with pytest.raises(FloatingPointError) as second:
        trainer.train(resume_from_checkpoint=True)
    assert str(first.value) == str(second.value)
    assert again.seen[-1] == broken.seen[-1]
    assert f"the loss of step {(len(broken.seen) + 2) // 3} is nan" in str(first.value)
    assert f"samples {', '.join(map(str, broken.seen[-1]))} of the training data" in str(first.value)


@pytest.mark.slow
@pytest.mark.parametrize("due", ["logging_steps", "save_steps", "eval_steps", "64 losses"])
def test_where_looking_costs_a_synchronisation_it_is_done_when_something_is_due(due, tmp_path, monkeypatch):
    """As on an accelerator: the error comes later, names the same samples, and nothing was saved in between."""
    monkeypatch.setattr("vlreft.training.faults._looking_is_free", lambda _: False)
    options = {"logging_steps": 500, "save_steps": 500, "eval_steps": 500, "eval_strategy": "steps", "max_steps": 100}
    broken, trainer = breaking(tmp_path, "nan", **(options | ({} if due == "64 losses" else {due: 20})))
    with pytest.raises(FloatingPointError) as caught:
        trainer.train()
    bad = next(place for place, marks in enumerate(broken.seen) if BAD in marks)
    assert f"the loss of step {bad + 1} is nan: samples {', '.join(map(str, broken.seen[bad]))} of" in str(caught.value)
    assert len(broken.seen) == (64 if due == "64 losses" else 20)
    assert last_checkpoint(tmp_path) is None


@pytest.mark.slow
def test_a_broken_gradient_is_laid_to_the_step_that_had_it(tmp_path):
    broken, trainer = breaking(tmp_path, "gradient", save_strategy="no")
    with pytest.raises(FloatingPointError, match="the trained numbers were broken before it") as caught:
        trainer.train()
    place = next(place for place, marks in enumerate(broken.seen) if BAD in marks)
    assert len(broken.seen) == place + 2
    culprit = f"broken before it, by step {place + 1}: samples {', '.join(map(str, broken.seen[place]))} of"
    assert culprit in str(caught.value)


def test_broken_numbers_are_not_saved(tmp_path):
    broken, trainer = breaking(tmp_path, "gradient", save_steps=1)
    with pytest.raises(FloatingPointError, match="they are not saved") as caught:
        trainer.train()
    step = len(broken.seen)
    assert f"not finite after step {step}, samples {', '.join(map(str, broken.seen[-1]))} of the" in str(caught.value)
    last = last_checkpoint(tmp_path)
    assert (last is None) == (step == 1)
    assert last is None or last.endswith(f"checkpoint-{step - 1}")


def test_batches_do_not_carry_the_numbers_further(tmp_path):
    """Not into the model, and not into what users make of the trainer's loader."""
    trainer = trainer_in(tmp_path, max_steps=2, save_strategy="no")
    assert all(set(batch) == {"input_ids", "labels"} for batch in trainer.get_train_dataloader())
    seen = []
    trainer.model.register_forward_pre_hook(lambda *args: seen.append(set(args[2])), with_kwargs=True)
    trainer.train()
    assert len(seen) == 2
    assert not any("sample_numbers" in names for names in seen)


# Data-loader workers --------------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    """A data set that does something at one sample; `at_once`: it reads whole batches."""

    def __init__(self, act):
        self.act, self.rows = act, rows()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        if number == BAD:
            self.act()
        return self.rows[number]


class RowsAtOnce(Rows):
    """The same, read a batch at a time."""

    def __getitems__(self, several):
        return [self[number] for number in several]


def raise_it():
    raise KeyError("a broken file")


WORKER_ENDS = {
    "exits": lambda: os._exit(3),
    "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "crashes": lambda: os.kill(os.getpid(), signal.SIGSEGV),
}


def told_of_a_death(trainer):
    """Train until a worker dies; in a fork, since torch tells of it out of a signal handler, and may leave a lock."""
    code, kind, text = in_a_fork(trainer.train)
    assert (code, kind) == (1, "RuntimeError"), text
    return text


@pytest.mark.parametrize(
    "end", [end if end == "is killed" else pytest.param(end, marks=pytest.mark.slow) for end in WORKER_ENDS]
)
def test_a_worker_that_dies_names_the_sample(end, tmp_path):
    data = Rows(WORKER_ENDS[end])
    told = told_of_a_death(trainer_in(tmp_path, parts={"train_dataset": data}, dataloader_num_workers=2))
    assert f"a data-loader worker died while it read sample {BAD} of the training" in told


def test_a_death_that_is_told_while_we_look_for_it(monkeypatch):
    """A worker's pipe breaks, and torch's signal handler raises before its process is seen to have ended."""
    watched = WatchedRows([0] * 20, list, num_workers=1, batch_size=2)
    watched.at_WN[0, PID], watched.at_WN[0, DOING], watched.at_WN[0, COUNT] = os.getpid(), COLLATING, 0
    told = f"DataLoader worker (pid {os.getpid()}) exited unexpectedly with exit code 3."
    monkeypatch.setattr(watched, "_dead", lambda: (_ for _ in ()).throw(RuntimeError(told)))
    where = watched.dead_worker(EOFError())
    assert where is not None
    assert "made a batch" in where


def test_a_worker_that_dies_over_a_batch_names_the_batch(tmp_path):
    data = RowsAtOnce(WORKER_ENDS["exits"])
    parts = {"train_dataset": data}
    told = told_of_a_death(trainer_in(tmp_path, parts=parts, dataloader_num_workers=1, save_steps=1))
    assert re.search(rf"died while it read the samples [\d, ]*\b{BAD}\b[\d, ]* of the training", told)

    parts = {"data_collator": lambda samples: os._exit(3 + 0 * len(samples))}
    told = told_of_a_death(trainer_in(tmp_path, parts=parts, dataloader_num_workers=1))
    assert re.search(r"died while it made a batch of the samples \d+, \d+, \d+, \d+ of the", told)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_error_in_the_data_names_the_sample(workers, tmp_path):
    def told(**parts):
        with pytest.raises(KeyError) as caught:
            trainer_in(tmp_path, parts=parts, dataloader_num_workers=workers).train()
        return f"{caught.value} {getattr(caught.value, '__notes__', '')}"

    assert f"while sample {BAD} of the training data was read" in told(train_dataset=Rows(raise_it))
    assert f"{BAD}" in told(train_dataset=RowsAtOnce(raise_it)).partition("while the samples ")[2]
    assert "while a batch was made of the samples" in told(data_collator=lambda samples: samples[0]["nothing"])


# Ctrl-C and SIGTERM --------------------------------------------------------------------------------------------------


def send(*signals):
    def act():
        for number in signals:
            os.kill(os.getpid(), number)

    return act


@pytest.mark.parametrize(
    ("number", "error", "strategy"), [(signal.SIGINT, KeyboardInterrupt, "no"), (signal.SIGTERM, SystemExit, "steps")]
)
def test_a_signal_saves_and_stops(number, error, strategy, whole, tmp_path, caplog):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    trainer = trainer_in(tmp_path, parts={"callbacks": [AtStep(11, send(number))]}, save_strategy=strategy)
    with caplog.at_level(logging.WARNING, "vlreft"), pytest.raises(error) as caught:
        trainer.train()
    assert error is KeyboardInterrupt or caught.value.code == 143
    assert trainer.state.global_step == 11
    assert f"stopped at step 11; {tmp_path / 'checkpoint-11'} is what" in caplog.text
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert same(resumed(tmp_path), whole[1])


def test_the_second_signal_stops_at_once(tmp_path):
    act = send(signal.SIGINT, signal.SIGINT)
    trainer = trainer_in(tmp_path, parts={"callbacks": [AtStep(11, act)]}, save_strategy="no")
    with pytest.raises(KeyboardInterrupt, match="at once"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_signal_at_the_very_end_is_not_lost(tmp_path):
    trainer = trainer_in(tmp_path, max_steps=3)
    trainer.add_callback(AtEnd())
    with pytest.raises(KeyboardInterrupt, match="had come to its end"):
        trainer.train()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")


class AtEnd(TrainerCallback):
    """Presses Ctrl-C when all steps are done."""

    def on_train_end(self, args, state, control, **kwargs):
        send(signal.SIGINT)()


def test_ignored_signals_stay_ignored(tmp_path):
    """As under nohup."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        trainer = trainer_in(tmp_path, parts={"callbacks": [AtStep(2, send(signal.SIGINT))]}, max_steps=4)
        trainer.train()
    finally:
        signal.signal(signal.SIGINT, before)
    assert trainer.state.global_step == 4


@pytest.mark.slow
def test_training_in_a_thread_catches_no_signals(tmp_path):
    """In a process of its own: after a worker's death, told out of a signal's handler, imports may stay locked."""
    found = worker("thread", tmp_path)
    assert found["steps"] == 2
    assert found["is_handled"] == [False, False]


def in_two_processes(folder, pressed_at):
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "1"}
    ranks = [started("rank", folder, pressed_at, RANK=rank, LOCAL_RANK=rank, **shared) for rank in "01"]
    return [ended(process) for process in ranks]


@pytest.mark.slow
def test_two_processes_stop_together_where_one_was_told_to(tmp_path):
    """At the next step that is logged or saved: 7 was pressed, 9 is saved."""
    whole = in_two_processes(tmp_path / "whole", 0)
    stopped = in_two_processes(tmp_path / "stopped", 7)
    message = (
        f"stopped at step 9; {tmp_path / 'stopped' / 'checkpoint-9'} is what resume_from_checkpoint=True goes on from"
    )
    assert [(rank["step"], rank["told"]) for rank in stopped] == [(9, message)] * 2
    assert in_two_processes(tmp_path / "stopped", 0) == whole
    assert whole[0] == whole[1]
    assert whole[0]["step"] == 40


def test_ctrl_c_reaches_the_workers_too_and_still_saves(whole, tmp_path):
    """A terminal sends it to the whole process group."""

    def train_in_a_group():
        os.setsid()
        press = AtStep(11, lambda: os.killpg(0, signal.SIGINT))
        trainer_in(tmp_path, parts={"callbacks": [press]}, dataloader_num_workers=2).train()

    code, kind, text = in_a_fork(train_in_a_group)
    assert (code, kind) == (1, "KeyboardInterrupt"), text
    assert f"{tmp_path / 'checkpoint-11'} is what" in text
    assert same(resumed(tmp_path), whole[1])
