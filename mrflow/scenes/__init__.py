"""The procedural worlds behind the embedded model: caption grammars, a renderer, exact readers and scores."""

from mrflow.scenes.fidelity import fidelity as fidelity
from mrflow.scenes.fidelity import law_distance as law_distance
from mrflow.scenes.grammar import FULL as FULL
from mrflow.scenes.grammar import CaptionError as CaptionError
from mrflow.scenes.grammar import Scene as Scene
from mrflow.scenes.grammar import World as World
from mrflow.scenes.grammar import held_out_captions as held_out_captions
from mrflow.scenes.grammar import parse_caption as parse_caption
from mrflow.scenes.grammar import sample_scene as sample_scene
from mrflow.scenes.hard import HARD as HARD
from mrflow.scenes.hard import HardWorld as HardWorld
from mrflow.scenes.legible import hard_score as hard_score
from mrflow.scenes.reading import read_facts as read_facts
from mrflow.scenes.render import render as render
from mrflow.scenes.score import CATEGORIES as CATEGORIES
from mrflow.scenes.score import score as score
from mrflow.scenes.score import score_facts as score_facts
from mrflow.scenes.stray import stray as stray
