"""vlreft: representation finetuning (ReFT) of frozen vision-language models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlreft.attaching import attach, load
    from vlreft.causes.boundless import BoundlessSchedule
    from vlreft.causes.directions import steer
    from vlreft.causes.interchange import InterchangeCollator, interchange_accuracy, patch_grid
    from vlreft.causes.subspaces import principal_angles
    from vlreft.config import Intervention, ReftConfig
    from vlreft.data.collator import Collator
    from vlreft.data.contrast import ClassCollator, PairCollator, contrastive_loss, zero_shot
    from vlreft.drawing.plots import plot_edits, plot_next_tokens, plot_placement
    from vlreft.merging import merge
    from vlreft.models.description import describe
    from vlreft.recipes import recipe
    from vlreft.reft import Reft
    from vlreft.reuse.features import FeatureCache
    from vlreft.reuse.kept import KeptPrefixes
    from vlreft.reuse.questions import Questions
    from vlreft.saving.adapterhub import import_adapterhub
    from vlreft.saving.pyreft import import_pyreft
    from vlreft.several import use
    from vlreft.training.trainer import ReftMixin, ReftTrainer
    from vlreft.training.twins import reference

__all__ = [
    "BoundlessSchedule",
    "ClassCollator",
    "Collator",
    "FeatureCache",
    "InterchangeCollator",
    "Intervention",
    "KeptPrefixes",
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
        from vlreft.saving import adapterhub as home
    elif name == "import_pyreft":
        from vlreft.saving import pyreft as home
    elif name == "Reft":
        from vlreft import reft as home
    elif name in ("ReftMixin", "ReftTrainer"):
        from vlreft.training import trainer as home
    elif name in ("ClassCollator", "PairCollator", "contrastive_loss", "zero_shot"):
        from vlreft.data import contrast as home
    elif name == "Collator":
        from vlreft.data import collator as home
    elif name in ("InterchangeCollator", "interchange_accuracy", "patch_grid"):
        from vlreft.causes import interchange as home
    elif name == "BoundlessSchedule":
        from vlreft.causes import boundless as home
    elif name == "steer":
        from vlreft.causes import directions as home
    elif name == "principal_angles":
        from vlreft.causes import subspaces as home
    elif name in ("plot_edits", "plot_next_tokens", "plot_placement"):
        from vlreft.drawing import plots as home
    elif name == "describe":
        from vlreft.models import description as home
    elif name == "FeatureCache":
        from vlreft.reuse import features as home
    elif name == "KeptPrefixes":
        from vlreft.reuse import kept as home
    elif name == "Questions":
        from vlreft.reuse import questions as home
    elif name == "merge":
        from vlreft import merging as home
    elif name == "use":
        from vlreft import several as home
    elif name == "recipe":
        from vlreft import recipes as home
    elif name == "reference":
        from vlreft.training import twins as home
    else:
        raise AttributeError(f"module 'vlreft' has no attribute '{name}'")
    return getattr(home, name)
