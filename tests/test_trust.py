"""Nothing that a stranger's adapter, config or position string can do: it is read, or refused in words of ours."""

import atexit
import contextlib
import itertools
import json
import logging
import os
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from safetensors.torch import load, save, save_file
from tiny import llama, llava, numbers, shake, shared_llama, shared_llava, text_batch, untouched

import vlreft
from vlreft.interventions import INTERVENTIONS
from vlreft.models.components import COMPONENTS
from vlreft.models.sites import find_sites
from vlreft.plan import plan_edits
from vlreft.positions import SEGMENTS, parse_positions
from vlreft.saving.checkpoint import (
    CONFIG_NAME,
    MAX_CONFIG_BYTES,
    MAX_HEADER_BYTES,
    WEIGHTS_NAME,
    check_plan,
    copy_tensors,
    read_checkpoint,
)

PACKAGE = Path(vlreft.__file__).parent
CONFIG = vlreft.ReftConfig(vlreft.Intervention("loreft", positions="f2+l2", rank=2))
GB = 1_000_000_000

HYPOTHESIS_HOME = tempfile.mkdtemp(prefix="vlreft-tests-")  # else it is made in the repository
set_hypothesis_home_dir(HYPOTHESIS_HOME)
atexit.register(shutil.rmtree, HYPOTHESIS_HOME, ignore_errors=True)


# What is watched over ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def bounded(num_bytes=GB, seconds=20):
    """Let what runs inside take at most so much more address space, and so long."""

    def give_up(*_):
        raise AssertionError(f"not done after {seconds} seconds")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def not_longer_than(seconds):
    """Start the clock of `bounded` anew."""
    signal.setitimer(signal.ITIMER_REAL, seconds)


def judged(function, *args):
    """Return what a function makes of its input, None if the library refused it; all else is raised."""
    try:
        return function(*args)
    except (ValueError, TypeError) as error:
        trace = error.__traceback__
        while trace.tb_next is not None:
            trace = trace.tb_next
        where = Path(trace.tb_frame.f_code.co_filename)
        if PACKAGE not in where.parents or len(str(error)) < 20:
            raise AssertionError(f"not refused by the library but by {where}") from error
        return None


def test_the_watch_sees_what_it_is_for():
    with pytest.raises((MemoryError, RuntimeError)), bounded():
        torch.zeros(400_000_000)
    with pytest.raises(AssertionError, match="not done"), bounded(seconds=0.2):
        time.sleep(60)
    with pytest.raises(AssertionError, match="not refused by the library"):
        judged(int, "no number")


# Absurd requests, one by one -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        *("f999999999999", "l999999999999", "uniform1000000000", "[0:99999999999]", "[-9999999999:]"),
        *("patches:rows[0:9999999999]cols[0:2]", "patches:box[0,0,99999999999,9]", "f1" * 10_000, "[1:2]+" * 5_000),
        *(
            "f٤",
            "f1+f1",
            "f-1",
            "f1 ",
            "f1\n",
            "f1\0",
            "\ud800",
            "",
            "+",
            ":",
            "prompt:",
            "PROMPT",
            "é:f1",
            "f" * 9_999,
        ),
    ],
)
def test_absurd_positions_are_refused(text):
    with bounded(50_000_000, 1), pytest.raises(ValueError, match="positions"):
        parse_positions(text)


@pytest.mark.parametrize("text", ["f999999", "uniform999999", "[-999999:]", "+".join(["[1:2]"] * 1000)])
def test_large_positions_cost_no_more_than_the_batch_has(text):
    """The numbers that are accepted are bounded by the tokens there are; a list of the picks would have been 28 GB."""
    model = shared_llama()
    reft = vlreft.attach(model, vlreft.ReftConfig(vlreft.Intervention("vector", layers=0, positions=text, tied=True)))
    try:
        with bounded(200_000_000, 20), torch.no_grad():
            model(**text_batch(num_rows=64, num_tokens=60))
    finally:
        reft.detach()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"layers": range(10**9)}, ValueError),
        ({"layers": itertools.count()}, ValueError),
        ({"layers": [10**30]}, None),
        ({"heads": range(10**9), "component": "heads"}, ValueError),
        ({"rank": 10**12}, None),
        ({"scale": 10**400}, TypeError),
        ({"scale": float("nan")}, TypeError),
        ({"dropout": -1e308}, ValueError),
        ({"groups": (str(i) for i in itertools.count())}, ValueError),
    ],
)
def test_absurd_fields_are_refused(changes, error):
    """By the config itself, or by the model that it is put on: nothing is made before."""
    model, fields = shared_llama(), {"method": "loreft", "rank": 2} | changes

    def attach():
        vlreft.attach(model, vlreft.ReftConfig(vlreft.Intervention(**fields)))

    with bounded(100_000_000), untouched(model):
        if error is not None:
            with pytest.raises(error):
                vlreft.Intervention(**fields)
        else:
            with pytest.raises(ValueError, match=r"out of range|must be at most"):
                attach()


def test_endless_lists_are_refused():
    with bounded(200_000_000), pytest.raises(ValueError, match="`interventions` lists more than 100,000"):
        vlreft.ReftConfig(itertools.repeat(vlreft.Intervention("vector")))
    with bounded(200_000_000), pytest.raises(ValueError, match="`modules_to_save` lists more than 100,000"):
        vlreft.ReftConfig(vlreft.Intervention("vector"), modules_to_save=(str(i) for i in itertools.count()))


# Files ---------------------------------------------------------------------------------------------------------------


def saved(folder, config=CONFIG, make=shared_llama):
    reft = shake(vlreft.attach(make(), config))
    reft.save_pretrained(folder)
    reft.detach()
    return numbers(reft)


def change_config(folder, change):
    data = json.loads((folder / CONFIG_NAME).read_text())
    change(data)
    (folder / CONFIG_NAME).write_text(json.dumps(data))


def header(declared, data=b"", length=None):
    text = json.dumps(declared).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


HEADERS = {
    "a tensor of 4 TB": header({"a": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}),
    "more than 64 bits": header({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, b"1234"),
    "a header of 2^63 bytes": header({}, length=2**63),
    "a header of 50 MB": header({}, b" " * 50_000_000, length=50_000_002),
    "offsets that overlap": header(
        {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"}, b"1234"
    ),
    "a negative shape": header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"),
    "an unknown dtype": header({"a": {"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
    "bytes behind the end": save({"a": torch.ones(1)}) + b"more",
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_is_held_against_the_file(name, tmp_path):
    saved(tmp_path)
    (tmp_path / WEIGHTS_NAME).write_bytes(HEADERS[name])
    with bounded(200_000_000), untouched(shared_llama()), pytest.raises(ValueError, match="is not a whole safetensors"):
        vlreft.load(shared_llama(), tmp_path)
    assert MAX_HEADER_BYTES == 10_000_000


def test_a_config_that_is_too_large_is_not_read(tmp_path):
    saved(tmp_path)
    with (tmp_path / CONFIG_NAME).open("r+b") as file:
        file.truncate(10 * GB)  # a sparse file
    with bounded(100_000_000), pytest.raises(ValueError, match=f"too many for a config.*{MAX_CONFIG_BYTES:,}"):
        vlreft.load(shared_llama(), tmp_path)


@pytest.mark.slow
def test_shapes_are_checked_before_a_tensor_is_read(tmp_path):
    """A file of 4 GB that declares honestly what it holds, and the config does not ask for."""
    saved(tmp_path)
    declared = {"0:text:0:f2.weight": {"dtype": "F32", "shape": [GB], "data_offsets": [0, 4 * GB]}}
    with (tmp_path / WEIGHTS_NAME).open("wb") as file:
        start = file.write(header(declared))
        file.truncate(start + 4 * GB)  # a sparse file
    shared_llama()
    Path("/proc/self/clear_refs").write_text("5")  # the peak of before is forgotten
    before = peak_bytes()
    with bounded(5 * GB), pytest.raises(ValueError, match=r"has shape \(1000000000,\) in the file and \(2, 16\) by"):
        vlreft.load(shared_llama(), tmp_path)
    assert peak_bytes() - before < GB / 10
    (tmp_path / WEIGHTS_NAME).read_bytes()
    assert peak_bytes() - before > 3 * GB, "the measure sees nothing"


def peak_bytes():
    """Return the most memory that the process had resident."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def test_a_plan_is_held_against_the_file_before_anything_is_made(tmp_path):
    """What a config asks for must be in the file: a small file cannot make a model grow."""
    saved(tmp_path)
    sites = find_sites(shared_llama())
    check_plan(read_checkpoint(tmp_path), plan_edits(CONFIG, sites), tmp_path)
    greedy = {"method": "noreft", "rank": 16, "positions": "+".join(f"[{i}:{i + 1}]" for i in range(400))}
    change_config(tmp_path, lambda data: data["interventions"][0].update(greedy))
    stored = read_checkpoint(tmp_path)
    with bounded(50_000_000), pytest.raises(ValueError, match=r"does not fit its config: missing .* and 3,?5\d\d more"):
        check_plan(stored, plan_edits(stored.config, sites), tmp_path)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", "lm_head/../lm_head", "vlreft", "a\0b"])
def test_names_are_modules_and_never_paths(name, tmp_path):
    saved(tmp_path)
    outside = tmp_path.parent / "passwd.safetensors"
    save_file({"weight": torch.ones(1)}, outside)
    change_config(tmp_path, lambda data: data.update(modules_to_save=[name]))
    with untouched(shared_llama()), pytest.raises(ValueError, match="has no module"):
        vlreft.load(shared_llama(), tmp_path)
    change_config(tmp_path, lambda data: data.update(modules_to_save=[]))
    change_config(tmp_path, lambda data: data["interventions"][0].update(site=name))
    with untouched(shared_llama()), pytest.raises(ValueError, match="has no site"):
        vlreft.load(shared_llama(), tmp_path)


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_what_is_no_file_is_not_opened(name, kind, tmp_path):
    """A pipe would wait for ever, the device never end."""
    saved(tmp_path)
    (tmp_path / name).unlink()
    if kind == "folder":
        (tmp_path / name).mkdir()
    elif kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    with bounded(100_000_000, 5), pytest.raises(ValueError, match=f"there is no {name}"):
        vlreft.load(shared_llama(), tmp_path)


def test_a_base_of_another_name_is_a_warning_in_the_log(tmp_path, caplog):
    model = llama()
    model.config.name_or_path = "acme/first"
    before = saved(tmp_path, make=lambda: model)
    with caplog.at_level(logging.WARNING, "vlreft"):
        vlreft.load(model, tmp_path).detach()
    assert caplog.text == ""
    model.config.name_or_path = "acme/second"
    with caplog.at_level(logging.WARNING, "vlreft"):
        again = vlreft.load(model, tmp_path)
    assert (
        f"the adapter in {tmp_path} was made for 'acme/first', this is 'acme/second' of the same shape" in caplog.text
    )
    assert all(torch.equal(value, before[name]) for name, value in numbers(again).items())


def test_tensors_of_a_dict_are_checked_too():
    with pytest.raises(ValueError, match=r"the import does not fit its config: 'a' is torch.float16 in the file"):
        copy_tensors({"a": torch.ones(2).half()}, {"a": torch.nn.Parameter(torch.ones(2))}, "the import")


# Generated -----------------------------------------------------------------------------------------------------------

NUM_FAST = 300
NUM_SLOW = {"positions": 60_000, "configs": 20_000, "headers": 20_000}

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["all", "text", "prompt:f1", "..", "/", "os.system", "__class__", "\0", "\ud800"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)
FEW = st.integers(1, 30).map(str) | st.sampled_from(["1", "007", "999999"])
ABSURD = st.sampled_from(["", "0", "-1"]) | st.integers(-20, 10**12).map(str)


def slices(number):
    return st.builds("[{}:{}]".format, st.sampled_from(["", "0", "-4"]), number | st.just("-1"))


def selects(number):
    return [
        *(st.just("all"), number.map("uniform{}".format), slices(number)),
        *(number.map("f{}".format), number.map("l{}".format)),
        st.builds("rows{}cols{}".format, slices(number), slices(number)),
        st.builds("box[0,0,{},{}]".format, number, number) | st.just("box"),
    ]


@st.composite
def spelled(draw, number=FEW):
    """A position string after the grammar, of a segment and kinds of selects that mostly go together."""
    segment = draw(st.sampled_from(["", *SEGMENTS]))
    kinds = selects(number)[: 7 if segment in ("patches", "image") else 5]
    chosen = draw(st.lists(st.sampled_from(range(len(kinds))), min_size=1, max_size=4, unique=True))
    return (f"{segment}:" if segment else "") + "+".join(draw(kinds[kind]) for kind in chosen)


SPELLED = spelled() | spelled(ABSURD)
CHARACTERS = st.text("acdeflmnopqrstuwxAZ0123456789+:[],-_ \n\0é٤", max_size=24)


@st.composite
def spoiled(draw):
    """A position string with a few characters replaced, doubled or left out."""
    text = draw(SPELLED)
    for _ in range(draw(st.integers(1, 3))):
        place, new = draw(st.integers(0, len(text))), draw(CHARACTERS)[:2]
        text = text[:place] + new + text[place + draw(st.integers(0, 2)) :]
    return text


POSITIONS = SPELLED | spoiled() | CHARACTERS | st.text(max_size=40)

FIELDS = {
    "method": st.sampled_from(list(INTERVENTIONS)),
    "site": st.sampled_from(["text", "vision", "connector", "model.layers", "lm_head", "model.embed_tokens"]),
    "layers": st.just("all") | st.integers(-4, 4) | st.lists(st.integers(-4, 4), max_size=3),
    "component": st.sampled_from(list(COMPONENTS)),
    "heads": st.none() | st.just("all") | st.lists(st.integers(0, 3), max_size=2),
    "positions": st.sampled_from(["f2+l2", "prompt:all", "question", "patches", "image:box", "[1:-1]"]) | POSITIONS,
    "rank": st.none() | st.integers(-1, 20) | st.integers(),
    "tied": st.booleans(),
    "init": st.sampled_from(["identity", "reference"]),
    "activation": st.sampled_from([None, "relu", "gelu"]),
    "dropout": st.sampled_from([0.0, 0.5, 1.0]) | st.floats(),
    "scale": st.sampled_from([1.0, 0.5]) | st.floats() | st.integers(),
    "groups": st.just([]) | st.lists(st.sampled_from(["a", "b", "c"]), max_size=3),
}
DEFAULTS = json.loads(CONFIG.to_json())["interventions"][0]


@st.composite
def configs(draw):
    """The data of a config: a good one with some fields drawn from what they may hold, and some from anything."""
    items = []
    for _ in range(draw(st.integers(1, 3))):
        item = dict(DEFAULTS)
        for name in draw(st.lists(st.sampled_from(list(DEFAULTS)), max_size=4, unique=True)):
            item[name] = draw(FIELDS.get(name, JUNK))
        if draw(st.integers(0, 3)) == 0:
            item[draw(st.sampled_from(list(DEFAULTS)) | st.text(max_size=6))] = draw(JUNK)
        items.append(item)
    data = {**json.loads(CONFIG.to_json()), "interventions": items}
    if draw(st.integers(0, 4)) == 0:
        data["modules_to_save"] = draw(
            st.lists(st.sampled_from(["lm_head", "norm", "model.norm", "x"]), max_size=2) | JUNK
        )
    if draw(st.integers(0, 9)) == 0:
        data[draw(st.sampled_from(list(data)) | st.text(max_size=6))] = draw(JUNK)
    return data


SHAPES = st.lists(st.integers(0, 20) | st.sampled_from([2**31, 2**63, 2**64 - 1, -1, 10**30]) | JUNK, max_size=3)
TENSORS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "F4", "OBJECT"]) | JUNK,
        "shape": SHAPES | JUNK,
        "data_offsets": st.tuples(st.integers(0, 3000), st.integers(0, 3000)).map(list) | SHAPES | JUNK,
    }
)


CHANGES = [
    lambda *_: {},
    lambda name, tensor: {f"{name}.more": tensor},
    lambda name, tensor: {name: tensor.half()},
    lambda name, tensor: {name: tensor.new_zeros(0, 2**40)},
    lambda name, tensor: {name: tensor[None]},
    lambda name, tensor: {name: tensor * float("nan")},
    lambda name, tensor: {name: tensor, "modules_to_save.lm_head.weight": tensor.clone()},
]


@st.composite
def weight_files(draw, good):
    """The bytes of a weights file: a good one with its header, its length or any of its bytes spoiled."""
    size = int.from_bytes(good[:8], "little")
    declared, data = json.loads(good[8 : 8 + size]), good[8 + size :]
    kind = draw(st.integers(0, 5))
    if kind == 0:
        place = draw(st.integers(0, len(good) - 1))
        return good[:place] + draw(st.binary(max_size=6)) + good[place + draw(st.integers(0, 6)) :]
    if kind == 1:
        return draw(st.binary(max_size=64))
    names = [name for name in declared if name != "__metadata__"]
    if kind == 5:  # a whole file of other tensors
        tensors = load(good)
        for name in draw(st.lists(st.sampled_from(names), max_size=2, unique=True)):
            change = draw(st.sampled_from(CHANGES))
            tensor = tensors.pop(name)
            tensors |= change(name, tensor)
        return save(tensors) if tensors else good
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=2)):
        if kind == 2:
            declared[name] = draw(TENSORS)
        else:
            declared[name] = {**declared[name], draw(st.sampled_from(["dtype", "shape", "data_offsets"])): draw(JUNK)}
    if kind == 4:
        declared[draw(st.text(max_size=8))] = draw(TENSORS | JUNK)
    try:
        text = json.dumps(declared).encode()
    except ValueError:  # a number of more digits than Python writes
        return good
    length = draw(st.sampled_from([len(text)] * 9 + [0, 1, len(text) - 1, len(text) + 1, 2**32, 2**63]))
    return length.to_bytes(8, "little") + text + data[: draw(st.sampled_from([len(data)] * 4 + [0, 7]))]


def many(test, num_examples):
    """Make a test that runs so many examples; the examples are always the same ones."""
    quick = settings(
        max_examples=num_examples,
        deadline=None,
        database=None,
        derandomize=False,
        suppress_health_check=list(HealthCheck),
    )
    return seed(20240404)(quick(test))


def tried_positions(num_examples):
    """Try position strings; accepted ones have to give masks, or say why not, on texts and pictures."""
    seen, batch = Counter(), text_batch(num_rows=2, num_tokens=7)
    model = shared_llama()

    def try_one(text):
        not_longer_than(20)
        positions = judged(parse_positions, text)
        seen["refused" if positions is None else "accepted"] += 1
        if positions is not None and seen["accepted"] % 10 == 0:
            config = judged(lambda: vlreft.ReftConfig(vlreft.Intervention("vector", layers=0, positions=text)))
            reft = judged(vlreft.attach, model, config)
            if reft is not None:
                try:
                    seen["run" if judged(lambda: model(**batch)) is not None else "not run"] += 1
                finally:
                    reft.detach()

    with bounded(), torch.no_grad():
        many(given(POSITIONS)(try_one), num_examples)()
    return seen


def tried_configs(num_examples):
    """Try configs; accepted ones are put on a text or a vision-language model, or say why not."""
    seen, models = Counter(), itertools.cycle([shared_llama(), shared_llava()])

    def try_one(data):
        not_longer_than(20)
        config = judged(vlreft.ReftConfig.from_dict, data)
        seen["refused" if config is None else "accepted"] += 1
        if config is None:
            return
        assert vlreft.ReftConfig.from_dict(json.loads(config.to_json())) == config
        reft = judged(vlreft.attach, next(models), config)
        if reft is not None:
            seen["attached"] += 1
            reft.detach()

    with bounded():
        many(given(configs())(try_one), num_examples)()
    return seen


def tried_headers(num_examples, folder):
    """Try weights files; what can be read has to fit, or is refused."""
    saved(folder)
    change_config(folder, lambda data: data.pop("weights"))  # else the hash refuses them all
    path, seen = folder / WEIGHTS_NAME, Counter()
    reft = vlreft.attach(shared_llama(), CONFIG)

    def try_one(content):
        not_longer_than(20)
        path.write_bytes(content)
        stored = judged(read_checkpoint, folder)
        seen["refused" if stored is None else "read"] += 1
        if stored is not None:
            copied = judged(lambda: [copy_tensors(stored.tensors, dict(reft.edits.named_parameters()), "the file")])
            seen["refused later" if copied is None else "copied"] += 1

    try:
        with bounded():
            many(given(weight_files(path.read_bytes()))(try_one), num_examples)()
    finally:
        reft.detach()
    return seen


def test_generated_positions_are_accepted_or_refused():
    seen = tried_positions(NUM_FAST)
    assert min(seen["accepted"], seen["refused"]) > NUM_FAST / 10, seen


def test_generated_configs_are_accepted_or_refused():
    seen = tried_configs(NUM_FAST)
    assert min(seen["accepted"], seen["refused"], seen["attached"]) > NUM_FAST / 20, seen


def test_generated_headers_are_accepted_or_refused(tmp_path):
    seen = tried_headers(NUM_FAST, tmp_path)
    assert seen["refused"] > NUM_FAST / 3, seen
    assert seen["copied"] > 0, seen


@pytest.mark.slow
@pytest.mark.parametrize("kind", NUM_SLOW)
def test_100_000_generated_inputs_are_accepted_or_refused(kind, tmp_path):
    assert sum(NUM_SLOW.values()) == 100_000
    if kind == "positions":
        seen = tried_positions(NUM_SLOW[kind])
    else:
        seen = tried_configs(NUM_SLOW[kind]) if kind == "configs" else tried_headers(NUM_SLOW[kind], tmp_path)
    print(kind, dict(seen))  # noqa: T201 (shown by pytest -rP)
    assert seen["refused"] > NUM_SLOW[kind] / 10
    assert seen["accepted"] + seen["read"] > NUM_SLOW[kind] / 50


def test_models_come_back_as_they_were():
    """After all that."""
    for shared, fresh in ((shared_llama(), llama()), (shared_llava(), llava())):
        assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in shared.state_dict().items())
        assert all(parameter.requires_grad for parameter in shared.parameters())
