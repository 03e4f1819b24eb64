"""Our models as Hugging Face transformers' own: importing this registers them with AutoConfig and AutoModelForCausalLM.

config: MoesaicConfig; model: MoesaicForCausalLM; cache: what `generate` keeps between two tokens. Tokenizers need no
class of ours: a run folder's files are transformers' format.
"""

from moesaic.errors import InstallationError

try:
    import transformers
except ImportError as error:
    raise InstallationError(
        f"moesaic.hf was imported and transformers cannot be ({error}); its models are transformers' models; install "
        f"it with `pip install 'moesaic[huggingface]'`."
    ) from None
if int(transformers.__version__.split(".")[0]) < 5:
    raise InstallationError(
        f"transformers {transformers.__version__} is installed; moesaic.hf requires 5.0 or later; install it with "
        f"`pip install 'moesaic[huggingface]'`."
    )

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moesaic.hf.cache import PagedCache
from moesaic.hf.config import MoesaicConfig
from moesaic.hf.model import MoesaicForCausalLM

__all__ = ["MoesaicConfig", "MoesaicForCausalLM", "PagedCache"]

AutoConfig.register(MoesaicConfig.model_type, MoesaicConfig, exist_ok=True)
AutoModelForCausalLM.register(MoesaicConfig, MoesaicForCausalLM, exist_ok=True)
# register leaves the names alone, and Trainer with label smoothing shifts labels for the classes named there only.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MoesaicConfig.model_type] = MoesaicForCausalLM.__name__
