"""The checker of shapes and types that is switched on in mrflow.models under pytest; an int passes for a float."""

from beartype import BeartypeConf, beartype

typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))
