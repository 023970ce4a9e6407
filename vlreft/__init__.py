"""vlreft: representation finetuning (ReFT) of frozen vision-language models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlreft.attaching import attach, load
    from vlreft.boundless import BoundlessSchedule
    from vlreft.config import Intervention, ReftConfig
    from vlreft.contrast import ClassCollator, PairCollator, contrastive_loss, zero_shot
    from vlreft.data import Collator
    from vlreft.description import describe
    from vlreft.directions import steer
    from vlreft.features import FeatureCache
    from vlreft.foreign_adapterhub import import_adapterhub
    from vlreft.foreign_pyreft import import_pyreft
    from vlreft.interchange import InterchangeCollator, interchange_accuracy, patch_grid
    from vlreft.merging import merge
    from vlreft.plots import plot_edits, plot_next_tokens, plot_placement
    from vlreft.questions import Questions
    from vlreft.recipes import recipe
    from vlreft.reft import Reft
    from vlreft.several import use
    from vlreft.subspaces import principal_angles
    from vlreft.trainer import ReftMixin, ReftTrainer
    from vlreft.twins import reference

__all__ = [
    "BoundlessSchedule",
    "ClassCollator",
    "Collator",
    "FeatureCache",
    "InterchangeCollator",
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
    "import_adapterhub",
    "import_pyreft",
    "interchange_accuracy",
    "load",
    "merge",
    "patch_grid",
    "plot_edits",
    "plot_next_tokens",
    "plot_placement",
    "principal_angles",
    "recipe",
    "reference",
    "steer",
    "use",
    "zero_shot",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: transformers is slow to import, whatever it is asked for."""
    if name in ("Intervention", "ReftConfig"):
        from vlreft import config as home
    elif name in ("attach", "load"):
        from vlreft import attaching as home
    elif name == "import_adapterhub":
        from vlreft import foreign_adapterhub as home
    elif name == "import_pyreft":
        from vlreft import foreign_pyreft as home
    elif name == "Reft":
        from vlreft import reft as home
    elif name in ("ReftMixin", "ReftTrainer"):
        from vlreft import trainer as home
    elif name in ("ClassCollator", "PairCollator", "contrastive_loss", "zero_shot"):
        from vlreft import contrast as home
    elif name == "Collator":
        from vlreft import data as home
    elif name in ("InterchangeCollator", "interchange_accuracy", "patch_grid"):
        from vlreft import interchange as home
    elif name == "BoundlessSchedule":
        from vlreft import boundless as home
    elif name == "steer":
        from vlreft import directions as home
    elif name == "principal_angles":
        from vlreft import subspaces as home
    elif name in ("plot_edits", "plot_next_tokens", "plot_placement"):
        from vlreft import plots as home
    elif name == "describe":
        from vlreft import description as home
    elif name == "FeatureCache":
        from vlreft import features as home
    elif name == "Questions":
        from vlreft import questions as home
    elif name == "merge":
        from vlreft import merging as home
    elif name == "use":
        from vlreft import several as home
    elif name == "recipe":
        from vlreft import recipes as home
    elif name == "reference":
        from vlreft import twins as home
    else:
        raise AttributeError(f"module 'vlreft' has no attribute '{name}'")
    return getattr(home, name)
