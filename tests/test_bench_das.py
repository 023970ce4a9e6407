"""DAS beside pyvene's: the toy cause, both sides' steps, and the other interpreter."""

import json

import pytest
import torch

from tasks.bench.das import NO, WORKER, YES, Peer, answers, draw, is_first_equal, main, pairs, vlreft_method
from tasks.bench.das_worker import Pairs, Steps, accuracy, floor_method, load_base, start_rotation


def test_the_counterfactual_takes_the_cause_from_the_source():
    made = Pairs.read(pairs(400, 1))
    for base, source, answer in zip(made.base.tolist(), made.source.tolist(), made.answer.tolist(), strict=True):
        is_alike = (source[0] == source[1]) == (base[2] == base[3])
        assert answer == (YES if is_alike else NO)
    rows = draw(2000, torch.Generator().manual_seed(0))
    assert 0.45 < float(is_first_equal(rows).float().mean()) < 0.55
    assert 0.45 < float((answers(is_first_equal(rows), rows) == YES).float().mean()) < 0.55


@pytest.mark.slow
def test_the_command_alone(tmp_path, capsys):
    output = tmp_path / "new" / "das.json"
    options = [
        "--base-steps",
        "4",
        "--steps",
        "3",
        "--seeds",
        "2",
        "--rounds",
        "2",
        "--steps-per-round",
        "1",
        "--output",
        str(output),
    ]
    main(options)
    record = json.loads(output.read_text())
    assert [set(seed) for seed in record["accuracy"]] == [{"vlreft"}] * 2
    assert all(0.0 <= seed["vlreft"]["after"] <= 1.0 for seed in record["accuracy"])
    assert record["times"]["ratios"].keys() == {
        f"vlreft{size} / vlreft{size} floor, {kind}" for size in ("", " wide") for kind in ("wall", "cpu")
    }
    assert record["versions"]["theirs"] is None
    assert "seed 1: vlreft" in capsys.readouterr().out


def test_a_side_starts_where_the_other_does_and_moves(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": None, "eos_token_id": None}
    LlamaForCausalLM(LlamaConfig(vocab_size=10, **sizes, **ids)).save_pretrained(tmp_path)
    order = {"folder": str(tmp_path), "width": 16, "rank": 4, "layer": 0, "position": 1, "batch_size": 32}
    order |= {"train": pairs(200, 1), "test": pairs(50, 2)}
    method = vlreft_method(load_base(order), order, 5)
    (rotation,) = method.parameters
    assert rotation.equal(start_rotation(order, 5))
    assert 0.0 <= accuracy(method, Pairs.read(order["test"])) <= 1.0
    steps = Steps(method, order, 5)
    losses = [steps.step() for _ in range(3)]
    assert len(set(losses)) == 3
    assert not rotation.equal(start_rotation(order, 5))
    base = load_base(order)
    floor, ids_BL = floor_method(base, order), Pairs.read(order["test"]).base
    assert floor.exchange(ids_BL, ids_BL).equal(load_base(order)(input_ids=ids_BL).logits[:, -1])
    before = floor.parameters[0].detach().clone()
    Steps(floor, order, 5).step()
    assert not floor.parameters[0].equal(before)


def test_a_peer_answers_or_dies(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nread line\necho '{\"saw\": 1}'\n")
    python.chmod(0o755)
    peer = Peer(str(python), tmp_path / "order.json")
    assert peer.process.args == [str(python), str(WORKER), str(tmp_path / "order.json")]
    assert peer.ask(do="versions") == {"saw": 1}
    peer.process.wait()
    with pytest.raises(ValueError, match="pyvene's side died"):
        peer.ask(do="time", count=1)
    peer.close()
