"""Decoders in a model's decoder's place: linear previews, and the tiny autoencoders that others train."""

from mrflow.decoders.linear import POCKET_PREVIEW as POCKET_PREVIEW
from mrflow.decoders.linear import LinearDecoder as LinearDecoder
from mrflow.decoders.linear import linear_decoder as linear_decoder
from mrflow.decoders.tiny import TinyDecoder as TinyDecoder
