"""From resident memory at run time to a size of the weight files."""

from __future__ import annotations

from ...errors import BudgetError
from ...model.machine.host_memory import resident
from ...model.view import ModelView
from ...plan.budget import readable


def cache_bytes(view: ModelView, context: int) -> int:
    """Keys and values of one sequence in the checkpoint's dtype: 2 · context · layers · width of a key · element.

    An architecture that keeps less (a sliding window, a latent, a state) takes less than this.
    """
    text = view.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * context * len(view.layers) * heads * width * view.dtype.itemsize)


def size_for(view: ModelView, memory: int, context: int) -> int:
    """The bytes that weight files may take so that a process with them fits into `memory`.

    What else is there: the interpreter with torch and transformers (this process, which has read no weights yet), keys and
    values of one sequence, and the largest matrix multiplied out, as codes are in a prefill.

    Raises:
        BudgetError: nothing is left, or the model fits as it is.
    """
    process, cache = resident(), cache_bytes(view, context)
    matrix = max((target.numel for target in view.targets), default=0) * view.dtype.itemsize
    size = memory - process - cache - matrix
    other = (
        f"{readable(process)} of Python and libraries, {readable(cache)} of keys and values for {context} tokens, "
        f"{readable(matrix)} of one matrix"
    )
    if size <= 0:
        raise BudgetError(
            f"--memory {readable(memory)} leaves nothing for weights beside {other}.", "Give more, or a shorter --context."
        )
    if size >= view.nbytes:
        raise BudgetError(
            f"The model fits as it is: {readable(view.nbytes)} beside {other} is less than --memory {readable(memory)}.",
            "Nothing has to be compressed; --size or --ratio ask for less.",
        )
    return size
