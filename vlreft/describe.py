"""`python -m vlreft.describe NAME_OR_FOLDER`: say what can be edited in a model, from its config alone.

Nothing may import this file: as an attribute of the package, `vlreft.describe` is the function of that name.
"""

import logging

import transformers

from vlreft.models.description import main

if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)  # open_clip warns that a model without weights has none
    raise SystemExit(main())
