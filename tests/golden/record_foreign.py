"""Record what pyreft and AdapterHub's adapters save, and what their models answer with it, on tiny random models.

Made `foreign.tar.gz` with pyreft 0.1.0 on pyvene 0.1.8, and adapters 1.3.0, on transformers 4.57.6 and torch 2.14.1,
CPU, float32. Everything is trained for three steps, so that nothing is at a start where an error could hide, and saved
by the library's own function. Run it in an environment with those versions: `python record_foreign.py`.
"""

import json
import tarfile
import tempfile
from pathlib import Path

import adapters
import numpy as np
import pyreft
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

TEXT = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
LLAMA = {**TEXT, "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0}
BERT = {**TEXT, "max_position_embeddings": 32, "pad_token_id": 0}
IDS = torch.randint(1, 32, (2, 7), generator=torch.Generator().manual_seed(0))
# The second row is shorter, by two tokens on the left and by one on the right.
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 0]])
RANK = 2

# name: class, settings, positions, whether prefix and suffix share weights
PYREFT = {
    "loreft": (pyreft.LoreftIntervention, {}, "f2+l2", False),
    "loreft_tied": (pyreft.LoreftIntervention, {}, "f2+l2", True),
    "loreft_relu": (pyreft.LoreftIntervention, {"act_fn": "relu"}, "l2", False),
    "direft": (pyreft.DireftIntervention, {}, "f2+l2", False),
    "noreft": (pyreft.NoreftIntervention, {"add_bias": True}, "f2+l2", False),
    "noreft_nobias": (pyreft.NoreftIntervention, {"add_bias": False}, "l1", False),
    "nodireft": (pyreft.NodireftIntervention, {"add_bias": True}, "l1", False),
    "consreft": (pyreft.ConsreftIntervention, {}, "f1", False),
    "lobireft": (pyreft.LobireftIntervention, {}, "f1", False),
}
# name: model, config, whether as safetensors
ADAPTERHUB = {
    "loreft": ("llama", adapters.LoReftConfig(prefix_positions=2, suffix_positions=2, r=RANK), False),
    "loreft_tied": ("llama", adapters.LoReftConfig(suffix_positions=1, r=RANK, tied_weights=True), True),
    "loreft_prefix": ("llama", adapters.LoReftConfig(prefix_positions=2, r=RANK, non_linearity="relu"), False),
    "loreft_suffix": ("llama", adapters.LoReftConfig(prefix_positions=0, suffix_positions=3, r=RANK), True),
    "loreft_layer": ("llama", adapters.LoReftConfig(layers=[1], r=1), False),
    "noreft": ("llama", adapters.NoReftConfig(suffix_positions=2, r=RANK), True),
    "direft": ("llama", adapters.DiReftConfig(suffix_positions=2, r=RANK), False),
    "bert": ("bert", adapters.LoReftConfig(prefix_positions=2, suffix_positions=1, r=RANK), True),
}


def base_model(kind):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA)) if kind == "llama" else BertModel(BertConfig(**BERT))
    return model.eval()


def train(parameters, run):
    optimizer = torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        run().square().mean().backward()
        optimizer.step()


def record_pyreft(name, folder, component="block_output"):
    """Save one of pyreft's, at both blocks if it has a prefix and a suffix; return its logits."""
    kind, settings, positions, is_tied = PYREFT[name]
    layers = (0, 1) if "+" in positions else (1,)
    model = base_model("llama")
    two = "+" in positions and not is_tied
    torch.manual_seed(1)
    representations = [
        {
            "layer": layer,
            "component": component.format(layer=layer),
            "low_rank_dimension": RANK,
            "intervention": kind(embed_dim=16, low_rank_dimension=RANK, dtype=torch.float32, **settings),
        }
        for layer in (*layers, *(layers if two else ()))
    ]
    reft = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=representations))
    reft.eval()
    places = pyreft.get_intervention_locations(
        last_position=IDS.shape[1], positions=positions, num_interventions=len(representations), share_weights=is_tied
    )
    where = {"sources->base": (None, [[place] * len(IDS) for place in places])}

    def run():
        return reft({"input_ids": IDS}, unit_locations=where)[1].logits

    train([p for item in reft.interventions.values() for p in item.parameters()], run)
    reft.save(str(folder))
    return run().detach()


def record_trainer(folder):
    """Save what pyreft's trainer saves: no config, and beside the intervention the trained parameters of the base."""
    model = base_model("llama")
    torch.manual_seed(1)
    item = pyreft.LoreftIntervention(embed_dim=16, low_rank_dimension=RANK, dtype=torch.float32)
    config = {"layer": 1, "component": "block_output", "low_rank_dimension": RANK, "intervention": item}
    reft = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=config))
    reft.eval()
    model.lm_head.requires_grad_(True)
    where = {"sources->base": (None, [[[6]] * len(IDS)])}

    def run():
        return reft({"input_ids": IDS}, unit_locations=where)[1].logits

    train([*item.parameters(), *model.lm_head.parameters()], run)
    reft.save_intervention(str(folder), include_model=True)
    return run().detach()


def record_adapterhub(name, folder):
    """Save one of AdapterHub's; return the logits of whole rows, and of padded ones."""
    kind, config, is_safe = ADAPTERHUB[name]
    model = base_model(kind)
    adapters.init(model)
    torch.manual_seed(1)
    model.add_adapter("mine", config=config)
    model.train_adapter("mine")
    model.eval()
    has_head = name == "loreft"  # trained too, and saved beside the adapter
    if has_head:
        model.lm_head.requires_grad_(True)

    def run(mask=None):
        outputs = model(input_ids=IDS, attention_mask=torch.ones_like(IDS) if mask is None else mask)
        return outputs.logits if kind == "llama" else outputs.last_hidden_state

    train(model.parameters(), run)
    folder.parent.mkdir(exist_ok=True)
    model.save_adapter(str(folder), "mine", with_head=has_head, use_safetensors=is_safe)
    return run().detach(), run(MASK).detach()


def main(folder):
    expected = {"ids": IDS, "mask": MASK}
    for kind, config in (("llama", LLAMA), ("bert", BERT)):
        model = base_model(kind)
        expected |= {f"base/{kind}/{name}": tensor for name, tensor in model.state_dict().items()}
        expected[f"config/{kind}"] = json.dumps(config)
        outputs = model(input_ids=IDS, attention_mask=torch.ones_like(IDS))
        expected[f"plain/{kind}"] = (outputs.logits if kind == "llama" else outputs.last_hidden_state).detach()
    for name in PYREFT:
        expected[f"pyreft/{name}"] = record_pyreft(name, folder / "pyreft" / name)
    path = "model.layers[{layer}].output"
    expected["pyreft/path"] = record_pyreft("loreft", folder / "pyreft" / "path", path)
    expected["pyreft/trainer"] = record_trainer(folder / "pyreft" / "trainer")
    for name in ADAPTERHUB:
        whole, padded = record_adapterhub(name, folder / "adapterhub" / name)
        expected |= {f"adapterhub/{name}": whole, f"adapterhub/{name}/padded": padded}
    np.savez_compressed(folder / "expected.npz", **{name: np.asarray(value) for name, value in expected.items()})


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        main(Path(made))
        with tarfile.open(Path(__file__).with_name("foreign.tar.gz"), "w:gz") as archive:
            for path in sorted(Path(made).iterdir()):
                archive.add(path, path.name)
