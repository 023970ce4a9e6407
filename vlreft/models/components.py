"""Components: what of a block is edited: its output or input, its attention's or MLP's output, single heads."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

COMPONENTS = ("output", "input", "attention", "mlp", "heads")
MLP_NAMES = ("mlp", "feed_forward", "feedforward", "ffn", "ff", "moe", "dense_relu_dense", "denserelu")
# Last layers of an MLP that has no module of its own, relative to the block.
BARE_MLPS = ("output.dense", "fc2", "linear2", "ffn_output")
# Linear layers of an attention that are not its output projection, without "_proj": some are registered behind it.
INNER_PROJECTIONS = (
    *("q", "k", "v", "qkv", "kv", "query", "key", "value", "q_gate", "gate", "g", "z", "in", "in_proj_z"),
    *("output_gate", "receptance"),
)
HEAD_WIDTHS = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "num_attn_heads")


@dataclass(frozen=True, eq=False)
class Target:
    """The module to hook for a component: `width` is that of the states there, `num_heads` how many share it.

    `at_input`: the edit acts on what goes in. `block`: the block that the module runs inside of, None if it is none of
    a block's insides.
    """

    module: nn.Module
    width: int
    at_input: bool = False
    num_heads: int = 0
    block: nn.Module | None = None

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.width // self.num_heads


def find_target(block: nn.Module, component: str, width: int, where: str) -> Target:
    """Find a component of a block of hidden width `width`. Raises ValueError, naming `where`, if it has none."""
    if component in ("output", "input"):
        return Target(block, width, at_input=component == "input")
    if component == "mlp":
        return Target(_mlp(block, width, where), width, block=block)
    attention = _attention(block, where)
    if isinstance(attention, nn.MultiheadAttention):
        if component == "attention":
            return Target(attention, width, block=block)
        raise ValueError(
            f"{where} keeps its heads inside torch.nn.MultiheadAttention, which no hook reaches; use "
            "component='attention'"
        )
    projection = _last_projection(attention, width, INNER_PROJECTIONS)
    if projection is None:
        raise ValueError(
            f"{where}: the output projection of its attention ({type(attention).__name__}) was not found; name a "
            "module by its path in `site` instead"
        )
    if component == "attention":
        return Target(projection, width, block=block)
    inner = _unwrapped(projection)
    assert isinstance(inner, nn.Linear | Conv1D)
    width_in = inner.in_features if isinstance(inner, nn.Linear) else inner.weight.shape[0]
    return Target(projection, width_in, True, _num_heads(attention, width_in, where), block)


def _attention(block: nn.Module, where: str) -> nn.Module:
    for name, module in _by_depth(block):
        last = name.rpartition(".")[2].lower()
        is_cross = any(part in name.lower() for part in ("cross", "encoder_att", "enc_dec", "encdec"))
        if "att" in last and "norm" not in last and not is_cross and any(True for _ in module.parameters()):
            if _has_projection(module):
                return module
    raise ValueError(f"{where} has no attention ({_children(block)}); name a module by its path in `site` instead")


def _mlp(block: nn.Module, width: int, where: str) -> nn.Module:
    named = dict(block.named_modules())
    for name, module in _by_depth(block):
        last = name.rpartition(".")[2].lower()
        if "norm" in last or not any(last == word or last.endswith(word) for word in MLP_NAMES):
            continue
        inner = _unwrapped(module)
        if isinstance(inner, nn.Linear | Conv1D) and _width_out(inner) != width:
            continue
        # Some MLPs add the residual stream themselves; a mixture of experts has no one last layer.
        is_plain = not any("expert" in inner or "router" in inner for inner, _ in module.named_modules())
        projection = _last_projection(module, width) if is_plain else None
        return module if projection is None else projection
    for bare in BARE_MLPS:
        ends = [name for name in named if f".{name}".endswith(f".{bare}")]
        if ends:
            return named[min(ends, key=lambda name: name.count("."))]
    raise ValueError(f"{where} has no MLP ({_children(block)}); name a module by its path in `site` instead")


def _last_projection(module: nn.Module, width: int, others: Sequence[str] = ()) -> nn.Module | None:
    """Return the last linear layer that gives states of this width and has none of these names.

    One that peft has put its own layer around is that layer, with what peft adds.
    """
    found, inside = None, set[nn.Module]()
    for name, layer in module.named_modules():
        if layer in inside:
            continue
        inner = _unwrapped(layer)
        if inner is not layer:
            inside.update(layer.modules())
        last = name.rpartition(".")[2].lower()
        is_other = last in others or last.removesuffix("_proj").removesuffix("_lin") in others
        if isinstance(inner, nn.Linear | Conv1D) and _width_out(inner) == width and not is_other:
            found = layer
    return found


def _unwrapped(module: nn.Module) -> nn.Module:
    """Return the layer that a layer of peft's is around, and any other as it is."""
    return dict(module.named_children()).get("base_layer", module)


def _has_projection(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) or any(
        isinstance(layer, nn.Linear | Conv1D) for layer in module.modules()
    )


def _width_out(layer: nn.Linear | Conv1D) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.nf


def _num_heads(attention: nn.Module, width: int, where: str) -> int:
    """Return how many heads share the input of the output projection: what families call it has no type."""
    for module in attention.modules():
        for name in HEAD_WIDTHS:
            size = getattr(module, name, None)
            if isinstance(size, int) and size > 0 and width % size == 0:
                return width // size
        for name in HEAD_COUNTS:
            count = getattr(module, name, None)
            if isinstance(count, int) and count > 0 and width % count == 0:
                return count
    raise ValueError(f"{where}: its attention does not say how many heads it has; use component='attention'")


def _by_depth(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    # A list of several attentions or MLPs is none of them.
    named = [(name, module) for name, module in block.named_modules() if name and type(module) is not nn.ModuleList]
    return iter(sorted(named, key=lambda item: item[0].count(".")))


def _children(block: nn.Module) -> str:
    return f"{type(block).__name__} holds {', '.join(name for name, _ in block.named_children())}"
