"""A Hugging Face folder as an mHC checkpoint of Megatron: `python -m megatron_mhc.import_hf`.

folder.py     what is done: an exported model comes back, a dense model gets mHC
values.py     config.json, whose values are checked as they are read
dense.py      the dense models' config.json as Megatron's arguments, and what is refused of it
tensors.py    a folder's tensors by the names of the exported model
launch.py     Megatron's arguments as words of a command line
checkpoint.py Megatron's model of these arguments, its tensors and the checkpoint
"""

from megatron_mhc.import_hf.folder import import_folder

__all__ = ["import_folder"]
