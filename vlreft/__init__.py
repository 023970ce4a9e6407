"""vlreft: representation finetuning (ReFT) of frozen vision-language models."""

from typing import TYPE_CHECKING, Any

from vlreft.attach import Reft, attach, load
from vlreft.config import Intervention, ReftConfig
from vlreft.data import Collator

if TYPE_CHECKING:
    from vlreft.trainer import ReftMixin, ReftTrainer

__all__ = ["Collator", "Intervention", "Reft", "ReftConfig", "ReftMixin", "ReftTrainer", "attach", "load"]


def __getattr__(name: str) -> Any:
    """Import the trainer when it is first used: `transformers.Trainer` takes longer than all the rest."""
    if name not in ("ReftMixin", "ReftTrainer"):
        raise AttributeError(f"module 'vlreft' has no attribute '{name}'")
    from vlreft import trainer

    return getattr(trainer, name)
