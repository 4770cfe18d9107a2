"""What a pass of a base model costs, computed from its modules and configuration without running it.

Counted are products with weights (of a mixture of experts those that a token visits), attention over the entries that
each position may see, the expansion of latent entries, and the two products of a recurrent layer with its state. Not
counted are norms, activations, rotations and everything else that is done number by number.

A layer of delta attention is counted in its plain recurrent form: a head whose state S is `[K, V]` answers a token with
S^T k and S^T q, 2 K V multiply-adds. That a state fades and is written to (k u^T) is done number by number. Over many
tokens a chunked evaluation does more products than that, for speed (nn/kda.py).

Latent attention keeps one latent vector per entry, from which the model expands every head's keys and values anew in
each pass, of committed entries too.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D  # a linear layer with its weight transposed

from deepen.backbones.hf import Backbone
from deepen.core.types import Work

# Names of modules and stacked weights that read what was made inside their half of a layer, attention or MLP; the
# others read the half's input, as it comes from its norm.
_INNER = (
    *("o_proj", "out_proj", "c_proj", "kv_b_proj", "q_b_proj", "f_b_proj", "g_b_proj", "conv1d"),
    *("down_proj", "fc2"),
)
# Of an adapter: the product that reads what the other one gives.
_ADAPTER_OUTER, _ADAPTER_INNER = "lora_B", "lora_A"
# What makes keys and values of latent entries.
_EXPANDING = "kv_b_proj"

# Whether any of these parameters gets a gradient.
_Gets = Callable[[Iterable[Tensor]], bool]

_NO_WORK = Work()


@dataclass(frozen=True)
class PassCosts:
    """Products of one row's pass, by what they grow with."""

    per_position: Work = _NO_WORK
    per_logit: Work = _NO_WORK
    per_visible: Work = _NO_WORK
    """For each pair of a position and an entry that it sees."""
    per_entry: Work = _NO_WORK
    """For each entry, committed ones too."""
    at_start: Work = _NO_WORK
    """What differs at the first token: the state before it gets no gradient where later ones do."""

    def over(self, *, num_positions: int, context: int = 0, num_logits: int | None = None) -> Work:
        """Of `num_positions` tokens behind `context` committed ones, which get no gradient.

        The head is counted at `num_logits` positions, all when None.
        """
        if num_positions == 0:
            return _NO_WORK
        visible = num_positions * context + num_positions * (num_positions + 1) // 2
        return (
            num_positions * self.per_position
            + (num_positions if num_logits is None else num_logits) * self.per_logit
            + visible * self.per_visible
            + (context + num_positions) * self.per_entry
            + self.at_start
        )

    def behind(self, *, num_rows: int, num_positions: int, num_kept: int, num_logits: int) -> Work:
        """Of a pass behind anchors (anchored.py), each row over as many positions and next to as many kept entries.

        Attention computes all pairs of a position and an entry, those too that it then hides.
        """
        num_entries = num_kept + num_positions
        of_row = (
            num_positions * self.per_position
            + num_logits * self.per_logit
            + num_positions * num_entries * self.per_visible
            + num_entries * self.per_entry
            + self.at_start
        )
        return num_rows * of_row

    def __add__(self, other: "PassCosts") -> "PassCosts":
        """Both together."""
        return PassCosts(**{name: part + vars(other)[name] for name, part in vars(self).items()})

    def flops(self, *, num_positions: int, context: int, num_logits: int | None = None) -> int:
        """FLOPs of the forward."""
        return self.over(num_positions=num_positions, context=context, num_logits=num_logits).forward_flops


def pass_costs(backbone: Backbone) -> PassCosts:
    """Of passes without gradient, which decoding makes. Looks at every module: ask once for many passes."""
    return _costs(backbone, lambda parameters: False, begins_after=None)


def pass_flops(backbone: Backbone, *, num_positions: int, context: int, num_logits: int | None = None) -> int:
    """FLOPs (2 per multiply-add) of one row's pass over `num_positions` tokens behind `context` committed ones.

    The head is counted at `num_logits` positions, all of them when it is None.
    """
    return pass_costs(backbone).flops(num_positions=num_positions, context=context, num_logits=num_logits)


def training_work(
    backbone: Backbone, *, num_positions: int, num_logits: int | None = None, begins_after: int | None = None
) -> Work:
    """Products of one row's forward over its first `num_positions` tokens, as the base's parameters get gradients.

    Which of them do is their `requires_grad`. `begins_after` is the layer at whose output a trained module of a
    method's own stands: behind it gradients flow in any case. Looking a token up is no product, but what is found has
    a gradient if the embedding is trained.

    Exact wherever a gradient reaches a layer, wherever nothing in it is trained, and in the layer where gradients
    begin, if that has one norm before its attention and one before its MLP, and each of these four is trained or frozen
    as a whole, or adapters are at any of a llama's linears. Where other parts of the attention or of the MLP are
    trained behind a frozen norm, this layer may be counted too high or too low, as a layer of another make may be;
    those above it are exact again.
    """
    costs = training_costs(backbone, begins_after=begins_after)
    return costs.over(num_positions=num_positions, num_logits=num_logits)


def training_costs(backbone: Backbone, *, begins_after: int | None = None) -> PassCosts:
    """What `training_work` is made of, by what it grows with."""
    return _costs(backbone, _requires_gradient, begins_after=begins_after)


def uncounted(backbone: Backbone) -> list[str]:
    """Names of matrices that are in no product that is counted; looking up is none."""
    counted = {product.weight for product in _products(backbone.model, backbone)}
    looked_up = {p for m in backbone.model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return [
        name
        for name, parameter in backbone.model.named_parameters()
        if sum(size > 1 for size in parameter.shape) > 1 and parameter not in counted and parameter not in looked_up
    ]


def gradient_reaches(backbone: Backbone, layer: int) -> bool:
    """Whether the output of `layer` (-1: what the first layer reads) gets a gradient from the base's own parameters."""
    below = [parameter for each in list(backbone.layers)[: layer + 1] for parameter in each.parameters()]
    return _requires_gradient([*_before_layers(backbone), *below])


def _requires_gradient(parameters: Iterable[Tensor]) -> bool:
    return any(parameter.requires_grad for parameter in parameters)


def _before_layers(backbone: Backbone) -> list[nn.Parameter]:
    """Embeddings of tokens and positions, and what else stands before the first layer."""
    behind = {p for part in (backbone.layers, backbone.final_norm, backbone.head) for p in part.parameters()}
    # A head that shares the embedding's weight is trained with it.
    return [*backbone.embedding.parameters(), *(p for p in backbone.model.parameters() if p not in behind)]


def _costs(backbone: Backbone, gets: _Gets, *, begins_after: int | None) -> PassCosts:
    flows = gets(_before_layers(backbone)) or begins_after == -1
    total = _beside_layers(backbone, gets, flows=flows)
    for index, layer in enumerate(backbone.layers):
        total += _layer_costs(backbone, index, gets, flows=flows)
        flows = flows or gets(layer.parameters()) or index == begins_after
    flows = flows or gets(backbone.final_norm.parameters())
    head = (product.work(gets, flows=flows) for product in _products(backbone.head, backbone))
    return total + PassCosts(per_logit=_total(head))


def _beside_layers(backbone: Backbone, gets: _Gets, *, flows: bool) -> PassCosts:
    """Products outside of layers and head, as between embeddings and layers of different widths."""
    known = {module for part in (backbone.layers, backbone.head) for module in part.modules()}
    others = (module for module in backbone.model.modules() if module not in known)
    products = (product for module in others for product in _own_products("", module, backbone))
    return PassCosts(per_position=_total(product.work(gets, flows=flows) for product in products))


def _total(parts: Iterable[Work]) -> Work:
    return sum(parts, _NO_WORK)


# One layer


@dataclass(frozen=True)
class _Product:
    """A product with a weight of `module`, at one position, or at one entry if it `expands` those.

    `path` leads to the weight from the part of the layer that it is in.
    """

    path: tuple[str, ...]
    module: nn.Module
    weight: Tensor
    multiply_adds: int

    @property
    def is_inner(self) -> bool:
        """Whether it reads what was made in its half of the layer, not what came through the norm."""
        return any(part in _INNER for part in self.path)

    @property
    def expands(self) -> bool:
        """Whether it is done for each entry."""
        return _EXPANDING in self.path

    @property
    def read_as(self) -> str:
        """What attention takes it for: some of query, key and value."""
        first = self.path[0].partition("_")[0]
        return first if first in ("q", "k", "v", "kv") else "qkv"

    def work(self, gets: _Gets, *, flows: bool) -> Work:
        """With a gradient that flows into it or not."""
        return Work.of(self.multiply_adds, operands=flows + gets([self.weight]))


def _products(module: nn.Module, backbone: Backbone) -> Iterator[_Product]:
    """All with weights in `module` and below."""
    for name, each in module.named_modules():
        yield from _own_products(name, each, backbone)


def _own_products(name: str, module: nn.Module, backbone: Backbone) -> Iterator[_Product]:
    for weight_name, weight, multiply_adds in _own_weights(module, backbone):
        yield _Product((*name.split("."), weight_name), module, weight, multiply_adds)


def _own_weights(module: nn.Module, backbone: Backbone) -> Iterator[tuple[str, Tensor, int]]:
    """This module's own weights by name, with the multiply-adds at one position."""
    own = dict(module.named_parameters(recurse=False))
    if isinstance(module, nn.Linear | nn.Conv1d | Conv1D):
        yield "weight", module.weight, module.weight.numel()
    elif "Experts" in type(module).__name__:
        # transformers stacks a layer's experts: [experts, out, in].
        for name, weight in own.items():
            if weight.ndim == 3:
                yield name, weight, backbone.config.num_experts_per_tok * weight[0].numel()
    elif "Router" in type(module).__name__ and "weight" in own:
        yield "weight", own["weight"], own["weight"].numel()


def _layer_costs(backbone: Backbone, index: int, gets: _Gets, *, flows: bool) -> PassCosts:
    """Of one layer, into which a gradient flows or not."""
    total = PassCosts()
    for place, (norm, parts) in enumerate(_halves(backbone.layers[index])):
        products = [product for part in parts for product in _products(part, backbone)]
        into_half = flows or gets(norm)
        readers = [product for product in products if not product.is_inner]
        reached = [each for each in readers if into_half or gets(each.module.parameters(recurse=False))]
        trained = {each.path for each in products if gets([each.weight])}
        for product in products:
            flows_in = bool(reached) if product.is_inner else into_half
            work = product.work(gets, flows=flows_in or _inside_adapter(product) in trained)
            total += PassCosts(per_entry=work) if product.expands else PassCosts(per_position=work)
        if place == 0:
            total += _attention_costs(backbone, index, read="".join(each.read_as for each in reached))
        flows = flows or gets([*norm, *(parameter for part in parts for parameter in part.parameters())])
    return total


def _inside_adapter(product: _Product) -> tuple[str, ...] | None:
    """The path of the product of an adapter whose result this one reads; None if it reads something else."""
    if _ADAPTER_OUTER not in product.path:
        return None
    return tuple(_ADAPTER_INNER if part == _ADAPTER_OUTER else part for part in product.path)


def _halves(layer: nn.Module) -> list[tuple[list[nn.Parameter], list[nn.Module]]]:
    """Attention and MLP, each as the parameters of the norm before it and its other parts.

    A layer that is made in another way is all one, and whatever is trained in it counts as its norm.
    """
    children = dict(layer.named_children())
    norms = [child for name, child in children.items() if _is_norm(name, child)]
    others = {name: child for name, child in children.items() if not _is_norm(name, child)}
    if len(norms) == 2 and ["attn" in name or "attention" in name for name in others] == [True, False]:
        return [(list(norm.parameters()), [part]) for norm, part in zip(norms, others.values(), strict=True)]
    return [(list(layer.parameters()), list(children.values()))]


def _is_norm(name: str, module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() or name.startswith("ln_")


def _attention_costs(backbone: Backbone, layer: int, *, read: str) -> PassCosts:
    """Products of a layer that are with no weight: two in each head, with entries or with the state.

    `read` has the letters of those of query (q), key (k) and value (v) that get a gradient.
    """
    if layer in backbone.recurrent_layers:
        heads = _DeltaHeads.of(backbone.config)
        # Each: what the state answers to a token's key, or to its query.
        each = heads.num_values * heads.key_width * heads.value_width
        return PassCosts(
            per_position=Work.of(2 * each, operands=2 if read else 0),
            # The state before the first token is zero, and no gradient goes there.
            at_start=Work(one_gradient=each, two_gradients=-each) if read else _NO_WORK,
        )
    num_heads, (key_width, value_width) = backbone.config.num_attention_heads, _head_widths(backbone)
    scores = Work.of(num_heads * key_width, operands=("q" in read) + ("k" in read))
    values = Work.of(num_heads * value_width, operands=("q" in read or "k" in read) + ("v" in read))
    return PassCosts(per_visible=scores + values)


def _head_widths(backbone: Backbone) -> tuple[int, int]:
    """Width of a head's keys and of its values."""
    config = backbone.config
    latent = getattr(config, "kv_lora_rank", None)
    if latent is not None:
        return config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return width, width


def row_state_bytes(backbone: Backbone, *, context: int) -> int:
    """Bytes of committed entries and states that one row of `context` tokens needs (stores are rounded up)."""
    config = backbone.config
    size = backbone.dtype.itemsize
    total = 0
    for layer in range(backbone.num_layers):
        if layer in backbone.recurrent_layers:
            heads = _DeltaHeads.of(config)
            # A convolution window in the model's dtype; the state itself in fp32, or wider.
            total += size * heads.num_columns * (config.linear_conv_kernel_dim - 1)
            total += max(4, size) * heads.num_values * heads.key_width * heads.value_width
        elif getattr(config, "kv_lora_rank", None) is not None:
            total += size * context * (config.kv_lora_rank + config.qk_rope_head_dim)
        else:
            num_key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            total += size * context * num_key_heads * sum(_head_widths(backbone))
    return total


def replay_bytes_per_token(backbone: Backbone) -> int:
    """Bytes that one token of a pass holds until its commit, so that a state after any count of them can be had.

    Of each recurrent layer: the inputs of its convolution in the model's dtype; key, update and decay in fp32 or wider.
    """
    size = backbone.dtype.itemsize
    total = 0
    for layer in range(backbone.num_layers):
        if layer in backbone.recurrent_layers:
            heads = _DeltaHeads.of(backbone.config)
            written = heads.num_values * (heads.key_width + heads.value_width + heads.decay_width)
            total += size * heads.num_columns + max(4, size) * written
    return total


@dataclass(frozen=True)
class _DeltaHeads:
    """The heads of a model's delta attention."""

    num_keys: int
    num_values: int
    key_width: int
    value_width: int
    decay_width: int
    """Numbers that say how a head's state fades with a token."""

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "_DeltaHeads":
        if hasattr(config, "linear_num_value_heads"):
            return cls(
                config.linear_num_key_heads,
                config.linear_num_value_heads,
                config.linear_key_head_dim,
                config.linear_value_head_dim,
                1,
            )
        heads, width = config.linear_num_heads, config.linear_head_dim
        return cls(heads, heads, width, width, width)

    @property
    def num_columns(self) -> int:
        """Channels of the short convolution: queries, keys and values."""
        return 2 * self.num_keys * self.key_width + self.num_values * self.value_width
