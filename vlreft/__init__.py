"""vlreft: representation finetuning (ReFT) of frozen vision-language models."""

from vlreft.attach import Reft as Reft
from vlreft.attach import attach as attach
from vlreft.attach import load as load
from vlreft.config import Intervention as Intervention
from vlreft.config import ReftConfig as ReftConfig
from vlreft.data import Collator as Collator
from vlreft.trainer import ReftMixin as ReftMixin
from vlreft.trainer import ReftTrainer as ReftTrainer
