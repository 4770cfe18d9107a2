"""What a pass costs: told in advance from the shares that are to be kept, and exactly of one that has run.

Multiply-adds, as docs/ledger.md counts them: of a token in one application of a layer those with its weights, without
the keys' and values' where it reads an earlier layer's; of each pair of a token and an entry that it sees, two heads'
widths; of a token that a router is asked about, the router's; the head at positions that get logits.
"""

from dataclasses import dataclass, field

from deepen.core.types import Work

from .config import MoRConfig
from .packing import Grid
from .routing import ExpertChoice, Routed


@dataclass(frozen=True)
class Prices:
    """Multiply-adds of one thing each."""

    layer: int
    """A token in a layer, but for keys and values."""
    entry: int
    """A token's keys and values in one layer."""
    pair: int
    level: int
    """An expert-choice router, asked about a token."""
    choice: int
    """The token-choice router."""
    logit: int

    @classmethod
    def of(cls, config: MoRConfig) -> "Prices":
        """Of a configuration's sizes."""
        hidden, num_recursions = config.hidden_size, config.num_recursions
        heads = config.num_attention_heads * config.head_dim
        token_router = hidden * num_recursions
        if config.router == "mlp":
            token_router = 2 * hidden * (hidden + num_recursions)
        return cls(
            layer=2 * hidden * heads + 3 * hidden * config.intermediate_size,
            entry=2 * hidden * config.num_key_value_heads * config.head_dim,
            pair=2 * heads,
            level=hidden,
            choice=token_router,
            logit=hidden * config.vocab_size,
        )


@dataclass(eq=False)
class Ran:
    """What one pass has run; counts of (token, layer) pairs and of what they read."""

    num_applied: int = 0
    num_entries: int = 0
    num_asked: int = 0
    num_chosen: int = 0
    _grids: list[Grid] = field(default_factory=list)

    def layer(self, num_tokens: int, grid: Grid, *, makes_entries: bool) -> None:
        """One application of a layer."""
        self.num_applied += num_tokens
        self.num_entries += num_tokens * makes_entries
        self._grids.append(grid)

    def asked(self, router: object, num_tokens: int) -> None:
        """A router was asked at one level; token-choice routers have answered before."""
        self.num_asked += num_tokens * isinstance(router, ExpertChoice)

    def began(self, routed: Routed, num_tokens: int) -> None:
        """The recursions begin."""
        self.num_chosen += num_tokens * (routed.choices is not None)

    @property
    def num_visible(self) -> int:
        """Pairs of a token and an entry that it saw, over all layers."""
        return sum(grid.num_visible for grid in self._grids)

    @property
    def num_computed(self) -> int:
        """Pairs that attention computed, with those that it hid."""
        return sum(grid.num_computed for grid in self._grids)

    def multiply_adds(self, prices: Prices, *, num_logits: int) -> int:
        """Of all of it, with the head at so many positions."""
        return (
            self.num_applied * prices.layer
            + self.num_entries * prices.entry
            + self.num_visible * prices.pair
            + self.num_asked * prices.level
            + self.num_chosen * prices.choice
            + num_logits * prices.logit
        )


def expected_multiply_adds(config: MoRConfig, *, num_positions: int, context: int, num_logits: int) -> int:
    """Of one row's pass if each recursion keeps the share of tokens that it is to keep, of earlier ones too."""
    prices, layout, shares = Prices.of(config), config.layout, expected_shares(config)
    total = float(num_logits * prices.logit)
    for layer in range(config.num_hidden_layers):
        level = layout.level_of(layer)
        source = layout.first_use(layer) if config.kv == "shared" else layer
        entries_level = 0 if config.kv == "frozen" else layout.level_of(source)
        run = shares[level] * num_positions
        # A token sees itself, and of the others the share that has entries.
        others = num_positions * context + num_positions * (num_positions - 1) / 2
        pairs = shares[level] * (num_positions + shares[entries_level] * others)
        total += run * (prices.layer + (source == layer) * prices.entry) + pairs * prices.pair
    if config.num_recursions > 1 and config.routing == "expert_choice":
        total += sum(shares[:-1]) * num_positions * prices.level
    if config.num_recursions > 1 and config.routing == "token_choice":
        total += num_positions * prices.choice
    return round(total)


def expected_state_bytes(config: MoRConfig, *, context: int, bytes_per_number: int) -> int:
    """Of keys and values of one row of `context` tokens, if each recursion has kept the share that it is to keep."""
    layout, shares = config.layout, expected_shares(config)
    held = [layer for layer in range(config.num_hidden_layers) if makes_entries(config, layer)]
    num_entries = sum(shares[layout.level_of(layer)] for layer in held) * context
    return round(num_entries * bytes_per_entry(config, bytes_per_number))


def held_bytes(config: MoRConfig, *, num_entries: tuple[int, ...], bytes_per_number: int) -> int:
    """Of keys and values, where so many tokens have run each recursion."""
    layers = (layer for layer in range(config.num_hidden_layers) if makes_entries(config, layer))
    total = sum(num_entries[config.layout.level_of(layer)] for layer in layers)
    return total * bytes_per_entry(config, bytes_per_number)


def makes_entries(config: MoRConfig, layer: int) -> bool:
    """Whether a layer of the unrolled depth makes keys and values of its own."""
    return config.kv != "shared" or config.layout.first_use(layer) == layer


def bytes_per_entry(config: MoRConfig, bytes_per_number: int) -> int:
    """Of one token's keys and values in one layer."""
    return 2 * config.num_key_value_heads * config.head_dim * bytes_per_number


def expected_shares(config: MoRConfig) -> tuple[float, ...]:
    """Of all tokens, the share that runs each recursion: the capacities; or balanced choices, which are the same."""
    return config.wanted_shares


def training_work(multiply_adds: int) -> Work:
    """Of a step that trains everything, the embedding too, so that each product has two operands with gradient."""
    return Work.of(multiply_adds, operands=2)
