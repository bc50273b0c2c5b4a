"""The procedural world behind the embedded model: a caption grammar, a renderer and an exact scorer."""

from mrflow.scenes.fidelity import fidelity as fidelity
from mrflow.scenes.fidelity import fidelity_many as fidelity_many
from mrflow.scenes.fidelity import law_distance as law_distance
from mrflow.scenes.grammar import FULL as FULL
from mrflow.scenes.grammar import POCKET_1 as POCKET_1
from mrflow.scenes.grammar import CaptionError as CaptionError
from mrflow.scenes.grammar import Scene as Scene
from mrflow.scenes.grammar import World as World
from mrflow.scenes.grammar import held_out as held_out
from mrflow.scenes.grammar import held_out_captions as held_out_captions
from mrflow.scenes.grammar import parse as parse
from mrflow.scenes.grammar import sample_caption as sample_caption
from mrflow.scenes.grammar import sample_scene as sample_scene
from mrflow.scenes.reading import Facts as Facts
from mrflow.scenes.reading import read as read
from mrflow.scenes.render import render as render
from mrflow.scenes.score import CATEGORIES as CATEGORIES
from mrflow.scenes.score import Scores as Scores
from mrflow.scenes.score import chance as chance
from mrflow.scenes.score import compare as compare
from mrflow.scenes.score import other_captions as other_captions
from mrflow.scenes.score import score as score
from mrflow.scenes.score import score_many as score_many
from mrflow.scenes.stray import stray as stray
