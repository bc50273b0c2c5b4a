"""mrflow in ComfyUI: put this folder into ComfyUI's custom_nodes, with mrflow installed beside it."""

from .nodes import NODE_CLASS_MAPPINGS as NODE_CLASS_MAPPINGS
from .nodes import NODE_DISPLAY_NAME_MAPPINGS as NODE_DISPLAY_NAME_MAPPINGS
