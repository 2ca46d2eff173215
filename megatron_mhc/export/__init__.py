"""A trained model as a Hugging Face folder: `python -m megatron_mhc.export`.

settings.py            Megatron's arguments as config.json, and what is refused of them
bridge_config.py       Megatron-Bridge's record of a run as those arguments
weights.py             a checkpoint's tensors by the names of the exported model
folder.py              what is written
modeling_mhc_gpt.py    the model itself, which goes into the folder; the one file that imports transformers
"""

from megatron_mhc.export.folder import export

__all__ = ["export"]
