"""What a toy is made of."""

from dataclasses import dataclass

from deepen.core.config import Config


@dataclass(frozen=True)
class ToyConfig(Config):
    """A block of `width` that recurs `num_recursions` times; without recursions it is the base itself."""

    width: int = 8
    num_recursions: int = 2

    def validate(self) -> list[str]:
        """One message for each value out of range."""
        problems = []
        if self.width < 1:
            problems.append(f"width must be at least 1, not {self.width}")
        if self.num_recursions < 0:
            problems.append(f"num_recursions must be 0 or more, not {self.num_recursions}")
        return problems
