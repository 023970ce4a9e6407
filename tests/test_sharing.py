"""Sharing: the model card, and the hub there and back, against a server on this machine that speaks its protocol."""

import base64
import contextlib
import hashlib
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import llama, numbers, shake, shared_llama, shared_llava, text_batch
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import vlreft
from vlreft.saving.checkpoint import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME

CONFIG = vlreft.ReftConfig(vlreft.Intervention("loreft", positions="f2+l2", rank=2))


def card_of(folder):
    """Return a card's metadata and its text."""
    _, metadata, text = (folder / CARD_NAME).read_text().split("---\n", 2)
    return yaml.safe_load(metadata), text


def table(text, title):
    """Return the rows of the table under a heading."""
    lines = text.split(f"## {title}\n\n")[1].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[:1] + lines[2:]]


def saved(folder, model, config, **settings):
    reft = shake(vlreft.attach(model, config))
    try:
        reft.save_pretrained(folder, **settings)
        return reft.num_parameters()
    finally:
        reft.detach()


# The card ------------------------------------------------------------------------------------------------------------


def test_the_card_says_base_config_metrics_and_how_to_load(tmp_path):
    items = [
        vlreft.Intervention("loreft", positions="question:f2+l2", rank=2, layers=[0, 2], scale=0.5),
        vlreft.Intervention("red", site="vision", positions="patches"),
    ]
    num = saved(tmp_path, shared_llava(), vlreft.ReftConfig(items), metrics={"a|b": 0.75, "CIDEr": "112.3 ± 0.4"})
    metadata, text = card_of(tmp_path)
    assert metadata == {"library_name": "vlreft", "tags": ["reft", "representation-finetuning"]}
    assert f"{num:,} numbers were trained" in text
    assert table(text, "Base") == [
        ["base", ""],
        ["class", "LlavaForConditionalGeneration"],
        ["type", "llava"],
        *([f"site `{name}`", f"{num} blocks, width {width}"] for name, num, width in SITES_OF_LLAVA),
    ]
    assert table(text, "Interventions") == [
        ["method", "site", "layers", "positions", "rank", "tied", "scale"],
        ["loreft", "text", "0, 2", "`question:f2+l2`", "2", "False", "0.5"],
        ["red", "vision", "all", "`patches`", "None", "False", "1.0"],
    ]
    assert table(text, "Metrics") == [["metric", "value"], ["a\\|b", "0.75"], ["CIDEr", "112.3 ± 0.4"]]


SITES_OF_LLAVA = [("text", 3, 16), ("vision", 4, 24), ("connector", 1, 16)]


def test_the_cards_code_loads_the_adapter(tmp_path):
    """It is run, with the two places that it leaves open filled in."""
    model = llama()
    model.save_pretrained(tmp_path / "base")
    saved(tmp_path / "adapter", model, CONFIG)
    _, text = card_of(tmp_path / "adapter")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    code = code.replace("path/to/the/base", str(tmp_path / "base"))
    found: dict[str, object] = {}
    exec(code.replace("path/to/this/folder", str(tmp_path / "adapter")), found)
    assert found["reft"].config == CONFIG


@pytest.mark.parametrize(
    ("name", "base_model"),
    [
        *[("llava-hf/llava-1.5-7b-hf", True), ("gpt2", True), ("", False), ("/models/x", False), ("a/b/c", False)],
        *[("x/y\nlicense: none", False), ("../x", False)],
    ],
)
def test_only_an_address_is_named_as_the_base(name, base_model, tmp_path):
    """The hub refuses a card with any other, and a path of this machine is nobody's business."""
    model = llama()
    model.config.name_or_path = name
    saved(tmp_path, model, CONFIG)
    metadata, text = card_of(tmp_path)
    assert metadata.get("base_model") == (name if base_model else None)
    assert (f"(https://huggingface.co/{name})" in text) is base_model
    assert set(metadata) <= {"base_model", "library_name", "tags"}


def test_a_local_folder_that_looks_like_an_address_is_none(tmp_path, monkeypatch):
    (tmp_path / "assets" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    model = llama()
    model.config.name_or_path = "assets/base"
    saved(tmp_path / "adapter", model, CONFIG)
    assert "base_model" not in card_of(tmp_path / "adapter")[0]


@pytest.mark.parametrize("metrics", [["accuracy"], {"accuracy": None}, {1: 0.5}, {"accuracy": [0.1, 0.2]}])
def test_metrics_are_names_and_numbers(metrics, tmp_path):
    with pytest.raises(TypeError, match=r"`metrics` must be a dict of names and numbers, .* got"):
        saved(tmp_path / "adapter", shared_llama(), CONFIG, metrics=metrics)
    assert not (tmp_path / "adapter").exists()


# The base's own folder -----------------------------------------------------------------------------------------------


def test_a_base_that_is_saved_with_an_adapter_on_it_is_the_base(tmp_path):
    """The adapter's numbers lie beside the base's, where transformers' own Trainer needs them; nothing loads them."""
    model = llama()
    base = model(**text_batch()).logits
    reft = shake(vlreft.attach(model, CONFIG))
    model.save_pretrained(tmp_path / "with")
    beside = {name for name in load_file(tmp_path / "with" / "model.safetensors") if name.startswith("vlreft.")}
    assert len(beside) == len(list(reft.parameters()))
    again, told = LlamaForCausalLM.from_pretrained(tmp_path / "with", output_loading_info=True)
    assert (set(told["unexpected_keys"]), set(told["missing_keys"])) == (beside, set())
    assert torch.equal(again(**text_batch()).logits, base)
    assert "vlreft" not in dict(again.named_children())
    reft.detach()
    model.save_pretrained(tmp_path / "without")
    assert not [name for name in load_file(tmp_path / "without" / "model.safetensors") if name.startswith("vlreft.")]


def test_transformers_own_trainer_finds_the_adapter_in_its_checkpoint(tmp_path):
    reft = vlreft.attach(llama(), CONFIG)
    rows = [{name: tensor[row] for name, tensor in text_batch().items()} for row in range(2)]
    settings = {"max_steps": 2, "save_steps": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    trainer = Trainer(model=reft.model, args=TrainingArguments(tmp_path, **settings), train_dataset=rows)
    trainer.train()
    trained = numbers(reft)
    shake(reft)
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(tensor, trained[name]) for name, tensor in numbers(reft).items())


# Names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapter", "a/b/c", "a b/c", "../x", "", "https://x.net/a/b", 3])
def test_a_bad_name_is_refused_before_anything_is_written(name, monkeypatch):
    reft = vlreft.attach(llama(), CONFIG)
    monkeypatch.setattr("tempfile.TemporaryDirectory", None)
    with pytest.raises(ValueError, match="must be like 'user/name'"):
        reft.push_to_hub(name)


def test_a_local_folder_has_no_revision(tmp_path):
    saved(tmp_path, shared_llama(), CONFIG)
    with pytest.raises(ValueError, match=r"`revision` \(='main'\) is for names on the hub; .* is a local folder"):
        vlreft.load(shared_llama(), tmp_path, revision="main")


def test_offline_what_was_never_fetched_cannot_be_had():
    with pytest.raises(ValueError, match=r"the adapter 'user/never' at revision 'v1' cannot be had from the hub: "):
        vlreft.load(shared_llama(), "user/never", revision="v1")


# The hub -------------------------------------------------------------------------------------------------------------

TOKEN = "right"


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's protocol that pushing and fetching need; what it holds is in the class."""

    protocol_version = "HTTP/1.1"
    repos: dict[str, dict[str, dict[str, bytes]]]  # name: commit: file: content; in their order
    created: dict[str, object]
    cards: list[str]
    requests: list[str]
    connections: list[socket.socket]  # kept alive, some of them
    is_away = False

    def setup(self):
        super().setup()
        self.connections.append(self.connection)

    def log_message(self, *_args):
        pass

    def answer(self, status, body=b"", **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = urllib.parse.urlsplit(self.path).path
        self.requests.append(f"POST {path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid credentials"})
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.validate(json.loads(body)["content"])
        elif path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            answers = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            self.answer(200, {"files": answers})
        else:
            self.commit(path.removeprefix("/api/models/").removesuffix("/commit/main"), body)

    def create(self, asked):
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.repos:
            return self.answer(409, {"url": f"{self.here}/{name}", "error": "exists"})
        self.repos[name], self.created[name] = {}, asked
        return self.answer(200, {"url": f"{self.here}/{name}"})

    def validate(self, content):
        self.cards.append(content)
        base = yaml.safe_load(content.split("---")[1]).get("base_model", "gpt2")
        is_good = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) is not None
        self.answer(200 if is_good else 400, {} if is_good else {"errors": [{"message": "base_model is not valid"}]})

    def commit(self, name, body):
        lines = [json.loads(line) for line in body.splitlines()]
        files = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines[1:]}
        assert lines[0]["key"] == "header"
        commit = hashlib.sha1(body).hexdigest()
        self.repos[name][commit] = {**(list(self.repos[name].values()) or [{}])[-1], **files}
        url = f"{self.here}/{name}/commit/{commit}"
        self.answer(200, {"success": True, "commitUrl": url, "commitOid": commit, "hookOutput": ""})

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.requests.append(f"{self.command} {path}")
        if self.is_away:
            self.close_connection = True  # without a word
            return None
        asked = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+)/(revision|tree|resolve)/([^/]+)(?:/(.+))?", path)
        name, kind, revision, file = asked.groups() if asked else ("", "", "", "")
        if name not in self.repos:
            return self.answer(401, {"error": "no"}, X_Error_Code="RepoNotFound")
        commits = self.repos[name]
        commit = list(commits)[-1] if revision == "main" else revision
        if commit not in commits:
            return self.answer(404, {"error": "no"}, X_Error_Code="RevisionNotFound")
        files = commits[commit]
        if kind == "revision":
            return self.answer(200, {"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in files]})
        if kind == "tree":
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in files.items()
            ]
            return self.answer(200, entries)
        return self.answer(200, files[file], X_Repo_Commit=commit, ETag=f'"{hashlib.sha1(files[file]).hexdigest()}"')

    @property
    def here(self):
        return f"http://127.0.0.1:{self.server.server_address[1]}"


WORKER = """
import json, sys, warnings
warnings.simplefilter("error")
import torch
from tiny import llama, shake
import vlreft

def failed(call):
    try:
        call()
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"

def outputs(model):
    return model(torch.tensor([[3, 4, 5, 6, 7, 8]])).logits.tolist()

model, config = llama(), vlreft.ReftConfig(vlreft.Intervention("loreft", positions="f2+l2", rank=2))
base, found = outputs(model), {}
reft = shake(vlreft.attach(model, config))
found["anonymous"] = failed(lambda: reft.push_to_hub("user/adapter", token="wrong"))
found["url"] = reft.push_to_hub("user/adapter", token="right", private=True, metrics={"accuracy": 0.5})
first = outputs(model)
shake(reft, seed=2)
reft.push_to_hub("user/adapter", token="right", message="more")
second = outputs(model)
reft.detach()
commits = json.loads(sys.stdin.readline())  # who made the server knows them
for place, revision, made in ((0, commits[0], first), (1, commits[1], second), (1, None, second)):
    reft = vlreft.load(model, "user/adapter", revision=revision)
    found[f"loaded {revision}"] = outputs(model) == made != base
    reft.detach()
found["no repository"] = failed(lambda: vlreft.load(model, "user/nothing"))
found["no revision"] = failed(lambda: vlreft.load(model, "user/adapter", revision="v9"))
found["no adapter"] = failed(lambda: vlreft.load(model, "user/other"))
found["base"] = outputs(model) == base
print(json.dumps(found), flush=True)
sys.stdin.readline()  # the server breaks its connections off
print(json.dumps({"broken off": failed(lambda: vlreft.load(model, "user/nothing"))}), flush=True)
sys.stdin.readline()  # the server is gone
vlreft.load(model, "user/adapter").detach()
print(json.dumps({"cached": True, "gone": failed(lambda: vlreft.load(model, "user/nothing"))}))
"""


def say(worker, line):
    """Let the worker go on; return what it says next."""
    worker.stdin.write(line + "\n")
    worker.stdin.flush()
    return worker.stdout.readline()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Run the worker against a hub on this machine; return what it found and what the hub holds."""
    hub = type("OneHub", (Hub,), {"repos": {}, "created": {}, "cards": [], "requests": [], "connections": []})
    hub.repos["user/other"] = {"0" * 40: {"model.safetensors": b"of somebody else"}}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))} | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(tmp_path_factory.mktemp("home")),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)]),
    }
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    worker = subprocess.Popen([sys.executable, "-c", WORKER], env=environment, text=True, **pipes)
    try:
        while worker.poll() is None and len(hub.repos.get("user/adapter", {})) < 2:
            threading.Event().wait(0.05)
        said = [say(worker, json.dumps(list(hub.repos.get("user/adapter", {}))))]
        hub.is_away = True
        said.append(say(worker, ""))
        server.shutdown()
        server.server_close()
        for connection in hub.connections:
            with contextlib.suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)
        last, errors = worker.communicate("\n", timeout=120)
        assert worker.returncode == 0, errors
        return {name: value for line in (*said, last) for name, value in json.loads(line).items()}, hub
    finally:
        worker.kill()
        server.server_close()


def test_what_is_pushed(shared):
    found, hub = shared
    assert found["url"].endswith("/user/adapter")
    assert hub.created["user/adapter"]["visibility"] == "private"
    one, two = hub.repos["user/adapter"].values()
    assert set(one) == set(two) == {CONFIG_NAME, WEIGHTS_NAME, CARD_NAME}
    assert one[CONFIG_NAME] != two[CONFIG_NAME]  # it holds the hash of the weights
    card = one[CARD_NAME].decode()
    assert 'vlreft.load(model, "user/adapter")' in card
    assert "path/to/this/folder" not in card
    assert "| accuracy | 0.5 |" in card
    assert "Metrics" not in two[CARD_NAME].decode()
    assert hub.cards.count(card) >= 1  # the hub was asked whether it is a good one


def test_what_is_pushed_comes_back_bit_for_bit(shared):
    found, hub = shared
    for revision in (*hub.repos["user/adapter"], None):
        assert found[f"loaded {revision}"] is True
    assert found["base"] is True
    assert not [line for line in hub.requests if "model.safetensors" in line and "reft_model" not in line]


def test_a_wrong_token_is_the_hubs_own_error(shared):
    found, _ = shared
    assert "401" in found["anonymous"]
    assert "OSError" not in found["anonymous"].split(":")[0]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no repository", r"ValueError: the adapter 'user/nothing' cannot be had from the hub: .*"),
        ("no revision", r"ValueError: the adapter 'user/adapter' at revision 'v9' cannot be had from the hub: .*"),
        ("no adapter", r"ValueError: no vlreft checkpoint in .*: there is no reft_config.json"),
        ("broken off", r"ValueError: the adapter 'user/nothing' cannot be had from the hub: .*disconnected.*"),
        ("gone", r"ValueError: the adapter 'user/nothing' cannot be had from the hub: .*ConnectError.*"),
    ],
)
def test_what_cannot_be_had_is_one_clear_error(shared, case, message):
    assert re.fullmatch(message, shared[0][case], re.DOTALL), shared[0][case]


def test_what_was_fetched_is_used_when_the_hub_is_away(shared):
    assert shared[0]["cached"] is True
