"""vlreft: representation finetuning (ReFT) of frozen vision-language models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlreft.config import Intervention, ReftConfig
    from vlreft.data import Collator
    from vlreft.reft import Reft, attach, load
    from vlreft.trainer import ReftMixin, ReftTrainer

__all__ = ["Collator", "Intervention", "Reft", "ReftConfig", "ReftMixin", "ReftTrainer", "attach", "load"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: transformers is slow to import, whatever it is asked for."""
    if name in ("Intervention", "ReftConfig"):
        from vlreft import config as home
    elif name in ("Reft", "attach", "load"):
        from vlreft import reft as home
    elif name in ("ReftMixin", "ReftTrainer"):
        from vlreft import trainer as home
    elif name == "Collator":
        from vlreft import data as home
    else:
        raise AttributeError(f"module 'vlreft' has no attribute '{name}'")
    return getattr(home, name)
