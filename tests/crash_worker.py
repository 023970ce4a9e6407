"""Trains a tiny model again and again in forked processes, kills them, and prints what came of it as JSON.

    python tests/crash_worker.py kill FOLDER NUM_KILLS SEED   kill -9 at random moments, half of them during a save
    python tests/crash_worker.py soak FOLDER NUM_STEPS        one long run; memory, open files and hooks on the way
    python tests/crash_worker.py rank FOLDER PRESSED_AT       one of several processes, started as torchrun starts them
    python tests/crash_worker.py thread FOLDER                a training in a thread that is not the main one

Torch and transformers are imported once, and each run is a fork.
"""

import gc
import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from tiny import llama
from transformers import TrainerCallback, TrainingArguments

import vlreft
from vlreft.training.folders import STAGING, last_checkpoint

NUM_STEPS, SAVE_STEPS = 40, 3


def rows(num_rows=24):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 29, (num_rows, 9), generator=generator).tolist()
    return [{"input_ids": row, "labels": [-100] * 5 + row[5:]} for row in ids]


def collate(batch):
    return {name: torch.tensor([row[name] for row in batch]) for name in ("input_ids", "labels")}


def trainer_in(folder, parts=None, **options):
    """Make a trainer whose result depends on every state that a checkpoint has to hold: shuffling, dropout, moments."""
    model = llama()
    torch.manual_seed(1)
    vlreft.attach(model, vlreft.ReftConfig(vlreft.Intervention("loreft", positions="f2+l2", rank=2, dropout=0.3)))
    defaults = {
        **{"max_steps": NUM_STEPS, "save_steps": SAVE_STEPS, "save_total_limit": 2, "logging_steps": 1, "seed": 7},
        **{"per_device_train_batch_size": 4, "learning_rate": 0.02, "weight_decay": 0.1},
        **{"use_cpu": True, "report_to": "none", "disable_tqdm": True},
    }
    arguments = TrainingArguments(output_dir=str(folder), **(defaults | options))
    data = {"data_collator": collate, "train_dataset": rows(), "eval_dataset": rows(4)}
    return vlreft.ReftTrainer(model=model, args=arguments, **(data | (parts or {})))


def train(folder):
    """Train to the end, from the last checkpoint if there is one; leave a hash of the numbers and of the log."""
    torch.manual_seed(os.getpid())  # whatever a fresh process starts from
    trainer = trainer_in(folder)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    digest = hashlib.sha256(json.dumps([entry.get("loss") for entry in trainer.state.log_history]).encode())
    for name, parameter in trainer.reft.edits.named_parameters():
        digest.update(name.encode() + parameter.detach().numpy().tobytes())
    (folder / "end").write_text(digest.hexdigest())


def start(folder):
    """Start a run in a process of its own and return its id."""
    folder.mkdir(parents=True, exist_ok=True)
    if pid := os.fork():
        return pid
    code = 1
    try:
        with (folder / "output").open("ab") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        train(folder)
        code = 0
    finally:
        if code:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(code)


def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_after(pid, folder, seconds, saves):
    """Kill a run after some seconds, or so long after its n-th save began; return whether a save was under way."""
    staging, seen, was_there = folder / STAGING, 0, False
    until = time.monotonic() + (seconds if saves == 0 else 60)
    while time.monotonic() < until:
        is_there = staging.exists()
        seen += is_there and not was_there
        was_there = is_there
        if saves and seen == saves:
            time.sleep(seconds)
            break
        time.sleep(0.0005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return staging.exists()


def kill(folder, num_kills, seed):
    random.seed(seed)
    started = time.monotonic()
    assert wait(start(folder / "whole")) == 0, (folder / "whole" / "output").read_text()
    whole, duration = (folder / "whole" / "end").read_text(), time.monotonic() - started
    found = []
    for number in range(num_kills):
        here = folder / f"killed-{number}"
        saves = 0 if number % 2 else random.randint(1, NUM_STEPS // SAVE_STEPS)
        pid = start(here)
        was_saving = kill_after(pid, here, random.random() * (0.02 if saves else 0.95 * duration), saves)
        last = last_checkpoint(here)
        left = sorted(path.name for path in (here / STAGING).rglob("*")) if was_saving else []
        code = wait(start(here))
        found.append(
            {
                "was_saving": was_saving,
                "left": left,
                "resumed_from": last and Path(last).name,
                "code": code,
                "is_same": code == 0 and (here / "end").read_text() == whole,
                "output": (here / "output").read_text()[-2000:] if code else "",
                "folders": sorted(path.name for path in here.iterdir() if path.is_dir()),
            }
        )
    return {"seconds_of_a_run": duration, "kills": found}


class Meter(TrainerCallback):
    """Notes this process' memory, open files and hooks every so many steps."""

    def __init__(self, every):
        self.every, self.found = every, []

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step % self.every == 0:
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
            hooks = sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
            files = len(list(Path("/proc/self/fd").iterdir()))
            self.found.append([state.global_step, pages * os.sysconf("SC_PAGE_SIZE"), files, hooks])


def soak(folder, num_steps):
    meter, started = Meter(num_steps // 10), time.monotonic()
    every = {"eval_strategy": "steps", "eval_steps": 250, "save_steps": 250, "logging_steps": 50}
    trainer = trainer_in(folder, max_steps=num_steps, **every)
    trainer.add_callback(meter)
    trainer.train()
    return {
        "seconds": time.monotonic() - started,
        "found": meter.found,
        "folders": sorted(path.name for path in folder.iterdir()),
        "evaluations": sum("eval_loss" in entry for entry in trainer.state.log_history),
    }


def rank(folder, pressed_at):
    """Train as one process of several; at a step the last one gets a Ctrl-C that the others do not see."""

    class Press(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == pressed_at and args.process_index == args.world_size - 1:
                os.kill(os.getpid(), signal.SIGINT)

    options = {"logging_steps": 5, "ddp_backend": "gloo", "per_device_train_batch_size": 2}
    trainer, told = trainer_in(folder, {"callbacks": [Press()]}, **options), ""
    try:
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    except KeyboardInterrupt as error:
        told = str(error)
    with torch.no_grad():
        total = [float(parameter.double().sum()) for parameter in trainer.reft.parameters()]
    torch.distributed.destroy_process_group()
    return {"step": trainer.state.global_step, "told": told, "numbers": total}


def in_a_thread(folder):
    """Train in a thread; return whether Ctrl-C was handled otherwise at each step."""
    before, is_handled = signal.getsignal(signal.SIGINT), []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            is_handled.append(signal.getsignal(signal.SIGINT) is not before)

    trainer = trainer_in(folder, {"callbacks": [Look()]}, max_steps=2, save_strategy="no")
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    return {"steps": trainer.state.global_step, "is_handled": is_handled}


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    what, where, *rest = sys.argv[1:]
    result = {"kill": kill, "soak": soak, "rank": rank, "thread": in_a_thread}[what](Path(where), *map(int, rest))
    sys.stdout.write(json.dumps(result) + "\n")
