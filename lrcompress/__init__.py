"""lrcompress makes a pretrained model smaller by low rank.

Importing the package registers the loader of compressed checkpoints with transformers.
"""

__version__ = "0.1.0"
