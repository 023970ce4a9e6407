"""peft's ways to adapt a base: low-rank updates, learnt scales, virtual tokens.

The layers that they sit at are found by structure, in the blocks of the sites that an intervention could sit at, not by
what families call them. Left out: peft's LN tuning, which trains what the method `norms` does, and bottleneck adapters
(Houlsby et al. 2019, Pfeiffer et al. 2020), which peft 0.21 does not have.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModelForCausalLM,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from peft.tuners.lora.layer import MultiheadAttention
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from tasks.methods.method import Adapted, Choice, Distributions, Method, Space, rates, trained_in_place
from tasks.methods.weights import given_back, head_parameters, refusal, trained
from tasks.setups import Setup
from vlreft import Collator
from vlreft.models.sites import Site, find_sites

RANKS = (1, 2, 4, 8, 16, 32)
ALPHAS = (1, 2, 4)  # multiples of the rank
NUM_VIRTUAL_TOKENS = (1, 4, 8, 16, 32, 64)
BOTH = "attention+mlp"
KEY_VALUE = re.compile(r"(k|v|kv|key|value|key_value)(_?proj|_?lin)?", re.IGNORECASE)

Layers = dict[str, nn.Module]


def stacks_of(setup: Setup) -> dict[str, tuple[str, ...]]:
    """Return the sites that adapters can sit at, by what a choice calls them: a model's text, its tower, or both."""
    sites = find_sites(setup.model).by_name
    text = tuple(name for name in ("text_encoder", "text") if name in sites)
    vision = tuple(name for name in ("vision",) if name in sites)
    is_dual = setup.task.kind in ("classes", "pairs")
    found = {
        "text": text,
        "vision": vision if is_dual else (),
        "text+vision": (*text, *vision) if text and vision else (),
    }
    return {name: stacks for name, stacks in found.items() if stacks}


def layers_of(model: nn.Module, site: Site) -> dict[str, Layers]:
    """Return the linear layers of a site's live blocks, those of attentions apart; attentions of torch are one each."""
    paths = {module: path for path, module in model.named_modules()}
    found: dict[str, Layers] = {"attention": {}, "mlp": {}}
    for block in site.blocks[: site.num_live]:
        whole: tuple[str, ...] = ()
        for name, module in block.named_modules():
            if isinstance(module, nn.MultiheadAttention):
                whole = (*whole, f"{name}.")
            elif not isinstance(module, nn.Linear | Conv1D) or name.startswith(whole):
                continue
            group = "attention" if "att" in name.lower() else "mlp"
            found[group][f"{paths[block]}.{name}"] = module
    return found


def regex(names: Iterable[str]) -> str:
    """Return a pattern of just these names: peft takes a name in a list as the end of others."""
    return "|".join(re.escape(name) for name in names) or "(?!)"


@dataclass(frozen=True)
class Targets:
    """Which layers an injected method can sit at. by_site: site, then "attention" or "mlp", then the layers' names."""

    by_site: Mapping[str, Mapping[str, Layers]]
    stacks: Mapping[str, tuple[str, ...]]

    @property
    def groups(self) -> tuple[str, ...]:
        """Groups that all sites have layers of, and both together."""
        found = tuple(g for g in ("attention", "mlp") if all(groups[g] for groups in self.by_site.values()))
        return (*found, BOTH) if len(found) > 1 else found

    def chosen(self, choice: Choice) -> Layers:
        """Return the layers of a choice."""
        groups = choice["modules"].split("+")
        sites = [self.by_site[site] for site in self.stacks[choice["stacks"]]]
        return {name: layer for site in sites for group in groups for name, layer in site[group].items()}

    def placement(self) -> Distributions:
        """Return what can be chosen of them."""
        return {
            "stacks": CategoricalDistribution(tuple(self.stacks)),
            "modules": CategoricalDistribution(self.groups),
        }

    def starts(self, **others: Any) -> tuple[Choice, ...]:
        """Every stack with the most modules, and the last with the fewest."""
        stacks = tuple(self.stacks)
        found = [{"stacks": stack, "modules": self.groups[-1], **others} for stack in stacks]
        few = {"stacks": stacks[-1], "modules": self.groups[0], **others}
        return (*found, few) if few not in found else tuple(found)


def targets_of(setup: Setup, name: str, kept: Any) -> Targets:
    """Find the layers. kept: returns which layers of a site's group the method takes. Raises ValueError if none."""
    stacks, sites = stacks_of(setup), find_sites(setup.model).by_name
    by_site: dict[str, dict[str, Layers]] = {}
    for site in dict.fromkeys(site for several in stacks.values() for site in several):
        groups = layers_of(setup.model, sites[site])
        by_site[site] = {group: kept(group, layers, sites[site]) for group, layers in groups.items()}
    targets = Targets(by_site, stacks)
    if not stacks or not targets.groups:
        raise refusal(
            name,
            setup,
            "no sort of linear layers that peft takes for it is in all of its stacks",
            "'norms' or 'loreft'",
        )
    return targets


@contextmanager
def injected(setup: Setup, name: str, config: PeftConfig, chosen: Layers) -> Iterator[Adapted]:
    """Put peft's layers around the chosen ones inside, in place; a head that has no weights yet is trained with them.

    Raises ValueError if peft refuses the model, or takes other layers: it swaps those of some mixtures of experts.
    """
    model: Any = setup.model
    heads = head_parameters(setup)
    with trained_in_place(model, heads), given_back(model):
        try:
            get_peft_model(model, config)
        except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
            raise refusal(name, setup, f"peft refuses it ({error})", "'norms' or 'loreft'") from error
        found = {path: layer for path, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
        whole = tuple(f"{path}." for path in chosen)
        if wrong := {path for path in found if not path.startswith(whole)} ^ chosen.keys():
            why = f"peft takes other layers than the chosen ones (first where they differ: {min(wrong)})"
            raise refusal(name, setup, why, "'norms' or 'loreft'")
        for parameter in heads.values():
            parameter.requires_grad_(True)
        for layer in found.values():
            if isinstance(layer, MultiheadAttention):
                keep_weights(layer)
        yield Adapted(model, trained(model))


def keep_weights(layer: MultiheadAttention) -> None:
    """Put an attention's very weights back behind each of its calls.

    peft adds the update to them and subtracts it again, so that rounding lets the frozen base drift as it is trained.
    """
    attention: Any = layer.get_base_layer()
    registers = [part._parameters for part in (attention, attention.out_proj.get_base_layer())]
    before = [dict(register) for register in registers]

    def put_back(*_: Any) -> None:
        for register, parameters in zip(registers, before, strict=True):
            register.clear()
            register.update(parameters)

    layer.register_forward_hook(put_back, always_call=True)


@dataclass(frozen=True)
class LoraMethod(Method):
    """LoRA (Hu et al. 2022) and what peft makes of it by `options` of its config.

    takes_attention_module: whether it can adapt torch's attention, of which peft takes input and output projection at
    once, or not at all; its update is not under dropout there, as it is added to the weights.
    """

    name: str = "lora"
    title: str = "LoRA"
    options: Mapping[str, Any] = field(default_factory=dict)
    takes_attention_module: bool = True
    learning_rates: tuple[float, float] = (1e-4, 1e-1)

    def space(self, setup: Setup) -> Space:
        """Choose stacks, modules, rank, alpha; learning rate and dropout."""
        targets = self._targets(setup)
        ranks = tuple(rank for rank in RANKS if rank <= min(_widths(targets)))
        placement: Distributions = {
            **targets.placement(),
            "rank": CategoricalDistribution(ranks),
            "alpha": CategoricalDistribution(ALPHAS),
        }
        training = {"learning_rate": rates(*self.learning_rates), "dropout": FloatDistribution(0.0, 0.2, step=0.05)}
        return Space(placement, training, targets.starts(rank=8 if 8 in ranks else ranks[-1], alpha=2))

    @contextmanager
    def adapted(self, setup: Setup, choice: Choice) -> Iterator[Adapted]:
        """Put the updates beside the chosen layers inside."""
        chosen = self._targets(setup).chosen(choice)
        config = LoraConfig(
            r=choice["rank"],
            lora_alpha=choice["alpha"] * choice["rank"],
            lora_dropout=choice.get("dropout", 0.0),
            target_modules=regex(chosen),
            fan_in_fan_out=_is_transposed(chosen),
            **self.options,
        )
        with injected(setup, self.name, config, chosen) as adapted:
            yield adapted

    def _targets(self, setup: Setup) -> Targets:
        def kept(_group: str, layers: Layers, _site: Site) -> Layers:
            return {name: layer for name, layer in layers.items() if self._takes(layer)}

        return targets_of(setup, self.name, kept)

    def _takes(self, layer: nn.Module) -> bool:
        if isinstance(layer, nn.MultiheadAttention):
            return self.takes_attention_module and layer.in_proj_weight is not None
        return True


def _is_transposed(layers: Layers) -> bool:
    """Whether they are GPT-2's, whose matrices are (in, out)."""
    return any(isinstance(layer, Conv1D) for layer in layers.values())


def _width_out(layer: nn.Linear | Conv1D) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.nf


def _widths(targets: Targets) -> list[int]:
    layers = [layer for groups in targets.by_site.values() for group in groups.values() for layer in group.values()]
    matrices = [layer.out_proj if isinstance(layer, nn.MultiheadAttention) else layer for layer in layers]
    return [width for matrix in matrices if isinstance(matrix, nn.Linear | Conv1D) for width in matrix.weight.shape]


@dataclass(frozen=True)
class Ia3Method(Method):
    """IA3 (Liu et al. 2022): a scale for each channel of the keys, the values and what the MLP's last layer reads.

    Keys and values that come out of one layer with the queries cannot be scaled apart, and are not offered.
    """

    name: str = "ia3"
    title: str = "IA3"
    learning_rates: tuple[float, float] = (1e-4, 1.0)

    def space(self, setup: Setup) -> Space:
        """Choose stacks and modules, and the learning rate."""
        targets = self._targets(setup)
        return Space(targets.placement(), {"learning_rate": rates(*self.learning_rates)}, targets.starts())

    @contextmanager
    def adapted(self, setup: Setup, choice: Choice) -> Iterator[Adapted]:
        """Put the scales around the chosen layers inside."""
        targets = self._targets(setup)
        chosen = targets.chosen(choice)
        outputs = [name for groups in targets.by_site.values() for name in groups["mlp"] if name in chosen]
        config = IA3Config(
            target_modules=regex(chosen), feedforward_modules=regex(outputs), fan_in_fan_out=_is_transposed(chosen)
        )
        with injected(setup, self.name, config, chosen) as adapted:
            yield adapted

    def _targets(self, setup: Setup) -> Targets:
        return targets_of(setup, self.name, _scaled)


def _scaled(group: str, layers: Layers, site: Site) -> Layers:
    """Keep the layers that give keys and values, and in each block's MLP the last one that gives the block's states."""
    linear = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear | Conv1D)}
    if group == "attention":
        return {name: layer for name, layer in linear.items() if KEY_VALUE.fullmatch(name.rpartition(".")[2])}
    inside = {id(module): number for number, block in enumerate(site.blocks) for module in block.modules()}
    outputs = [(name, layer) for name, layer in linear.items() if _width_out(layer) == site.width]
    last = {inside[id(layer)]: name for name, layer in outputs}
    return {name: linear[name] for name in last.values()}


class PromptedLM(PeftModelForCausalLM):
    """A language model behind virtual tokens that also generates with them.

    peft 0.21 prepares each step of a generation by names that transformers 5.24 no longer uses: a prefix is lost, and a
    prompt is put in again at every step. Here the virtual tokens are there before the generation starts.
    """

    def generate(self, *, input_ids: Tensor, attention_mask: Tensor, **others: Any) -> Any:
        """Generate behind the virtual tokens; the answer's ids (B, S) hold the prompt's, and no virtual token's."""
        config: Any = self.active_peft_config
        base: Any = self.get_base_model()
        virtual_BV = input_ids.new_zeros(len(input_ids), config.num_virtual_tokens)
        mask_BS = torch.cat([torch.ones_like(virtual_BV), attention_mask], 1)
        states = self.get_prompt(batch_size=len(input_ids))
        if isinstance(states, DynamicCache):
            # What the cache holds is cut off the ids, so that any ids can stand for it.
            ids_BS = torch.cat([virtual_BV, input_ids], 1)
            found = base.generate(input_ids=ids_BS, attention_mask=mask_BS, past_key_values=states, **others)
            return _with_ids(found, lambda ids_BS: ids_BS[:, config.num_virtual_tokens :])
        words_BSD = base.get_input_embeddings()(input_ids)
        states_BSD = torch.cat([states.to(words_BSD.dtype), words_BSD], 1)
        found = base.generate(inputs_embeds=states_BSD, attention_mask=mask_BS, **others)
        return _with_ids(found, lambda new_BS: torch.cat([input_ids, new_BS], 1))


def _with_ids(found: Any, change: Any) -> Any:
    """Change the ids that a generation returned, alone or with what else was asked for."""
    if isinstance(found, Tensor):
        return change(found)
    found.sequences = change(found.sequences)
    return found


@dataclass(frozen=True)
class VirtualTokensMethod(Method):
    """Trained states in front of the text: of the first layer (prompt tuning), or of every layer's cache (prefix).

    Whether a base can be adapted so is tried: what it generates must be what it gives when it reads its own answer.
    """

    name: str
    title: str
    config: Any
    starts_as_words: bool = False
    learning_rates: tuple[float, float] = (1e-3, 1.0)

    def space(self, setup: Setup) -> Space:
        """Choose how many, and the learning rate. Raises ValueError if the base is of a kind, or class, it can't do."""
        starts: tuple[Choice, ...] = ({"num_virtual_tokens": 8}, {"num_virtual_tokens": 32})
        with self.adapted(setup, starts[0]):
            placement: Distributions = {"num_virtual_tokens": CategoricalDistribution(NUM_VIRTUAL_TOKENS)}
        return Space(placement, {"learning_rate": rates(*self.learning_rates)}, starts)

    @contextmanager
    def adapted(self, setup: Setup, choice: Choice) -> Iterator[Adapted]:
        """Wrap the base inside: the wrapper is what is trained and what generates."""
        model: Any = setup.model
        if setup.task.kind != "generate":
            why = "peft puts virtual tokens around a model, and this task's answers come from the model itself"
            raise refusal(self.name, setup, why, "'lora'")
        config = self.config(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=choice["num_virtual_tokens"])
        with trained_in_place(model, {}), given_back(model):
            try:
                wrapper = PromptedLM(model, config).eval()
                if self.starts_as_words:
                    start_as_words(wrapper, setup)
                worst = _worst_step(wrapper, setup)
            # A model can fail in any way at what it was not made for.
            except (
                AttributeError,
                IndexError,
                KeyError,
                NotImplementedError,
                RuntimeError,
                TypeError,
                ValueError,
            ) as error:
                raise refusal(self.name, setup, f"trying it failed ({error})", "'lora'") from error
            if not worst <= _tolerance(model):
                why = f"what it generates is not what it gives as it reads its own answer (apart by {worst:.1e})"
                raise refusal(self.name, setup, why, "'lora'")
            yield Adapted(wrapper, trained(wrapper))


@torch.no_grad()
def start_as_words(wrapper: PromptedLM, setup: Setup) -> None:
    """Start a prompt as embeddings of random words (Lester et al. 2021, section 3.2).

    peft can do so too, but draws from all tokens: with the state of an image token in its prompt, a model looks for one
    picture more than there is.
    """
    collator: Any = setup.collator
    tokenizer = collator.tokenizer
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    words_V = torch.tensor([word for word in range(len(tokenizer)) if word not in special])
    (start,) = trained(wrapper).values()
    base: Any = wrapper.get_base_model()
    drawn_N = words_V[torch.randint(len(words_V), (len(start),))]
    start.copy_(base.get_input_embeddings()(drawn_N.to(start.device)))


def _tolerance(model: nn.Module) -> float:
    is_exact = next(model.parameters()).dtype in (torch.float32, torch.float64)
    return 1e-3 if is_exact else 3e-2


@torch.no_grad()
def _worst_step(wrapper: PromptedLM, setup: Setup) -> float:
    """Return how far logits of a padded batch's generation are from those of one row that is read, as a share."""
    assert isinstance(setup.collator, Collator)
    rows = [{"question": question} for question in ("what is it ?", "what is it and what is it ?")]
    if "image" in setup.task.features:
        rows = [
            {**row, "image": Image.new("RGB", (64, 64), color)}
            for row, color in zip(rows, ("red", "blue"), strict=True)
        ]
    device = next(wrapper.parameters()).device
    options: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    batch = _to(setup.collator.prompts(rows), device)
    found = wrapper.generate(**batch, **options)
    steps_BTV = torch.stack(found.logits, 1)
    answers_BT = found.sequences[:, batch["input_ids"].shape[1] :]
    worst = 0.0
    for row, answer_T, steps_TV in zip(rows, answers_BT, steps_BTV, strict=True):
        alone = _extended(_to(setup.collator.prompts([row]), device), answer_T)
        logits_TV = wrapper(**alone).logits[0, -len(answer_T) - 1 : -1]
        worst = max(worst, float((logits_TV - steps_TV).abs().max() / logits_TV.abs().max()))
    return worst


def _to(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _extended(batch: Mapping[str, Tensor], answer_T: Tensor) -> dict[str, Tensor]:
    """Put an answer behind the only row; what else is said of each token is, of the answer's, what text has: 0."""
    ids_BS = batch["input_ids"]
    fills = {"input_ids": answer_T, "attention_mask": torch.ones_like(answer_T)}
    return {
        name: torch.cat([tensor, fills.get(name, torch.zeros_like(answer_T))[None].to(tensor.dtype)], 1)
        if tensor.shape == ids_BS.shape
        else tensor
        for name, tensor in batch.items()
    }


ADAPTERS = (
    LoraMethod(),
    LoraMethod("rslora", "rsLoRA", {"use_rslora": True}),
    LoraMethod(
        "pissa", "PiSSA", {"init_lora_weights": "pissa"}, takes_attention_module=False, learning_rates=(1e-5, 1e-1)
    ),
    LoraMethod("dora", "DoRA", {"use_dora": True}, takes_attention_module=False),
    Ia3Method(),
    VirtualTokensMethod("prompt", "prompt tuning", PromptTuningConfig, starts_as_words=True),
    VirtualTokensMethod("prefix", "prefix tuning", PrefixTuningConfig),
)
