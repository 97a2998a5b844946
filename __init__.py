"""lrc: post-training compression of language models.

Importing this package is cheap: it loads neither torch nor transformers. It asks to be told when transformers' registry of
quantizers is imported, and registers lrc's own there, so that `import lrc` is all that a plain `from_pretrained` needs.
"""

import importlib
from importlib.metadata import version

import wrapt

__version__ = version("lrc")


@wrapt.when_imported("transformers.quantizers.auto")
def _register(_module: object) -> None:
    importlib.import_module(".checkpoint.hf_quantizer", __name__)  # registers itself at its end
