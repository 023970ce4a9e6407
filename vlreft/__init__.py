"""vlreft: representation finetuning (ReFT) of frozen vision-language models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlreft.config import Intervention, ReftConfig
    from vlreft.contrast import ClassCollator, PairCollator, contrastive_loss, zero_shot
    from vlreft.data import Collator
    from vlreft.description import describe
    from vlreft.features import FeatureCache
    from vlreft.questions import Questions
    from vlreft.recipes import recipe
    from vlreft.reft import Reft, attach, load
    from vlreft.several import use
    from vlreft.trainer import ReftMixin, ReftTrainer

__all__ = [
    "ClassCollator",
    "Collator",
    "FeatureCache",
    "Intervention",
    "PairCollator",
    "Questions",
    "Reft",
    "ReftConfig",
    "ReftMixin",
    "ReftTrainer",
    "attach",
    "contrastive_loss",
    "describe",
    "load",
    "recipe",
    "use",
    "zero_shot",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: transformers is slow to import, whatever it is asked for."""
    if name in ("Intervention", "ReftConfig"):
        from vlreft import config as home
    elif name in ("Reft", "attach", "load"):
        from vlreft import reft as home
    elif name in ("ReftMixin", "ReftTrainer"):
        from vlreft import trainer as home
    elif name in ("ClassCollator", "PairCollator", "contrastive_loss", "zero_shot"):
        from vlreft import contrast as home
    elif name == "Collator":
        from vlreft import data as home
    elif name == "describe":
        from vlreft import description as home
    elif name == "FeatureCache":
        from vlreft import features as home
    elif name == "Questions":
        from vlreft import questions as home
    elif name == "use":
        from vlreft import several as home
    elif name == "recipe":
        from vlreft import recipes as home
    else:
        raise AttributeError(f"module 'vlreft' has no attribute '{name}'")
    return getattr(home, name)
