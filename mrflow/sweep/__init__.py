"""The ablation engine: chains x prompts x seeds into a folder of rows and pictures, and what they show."""

from mrflow.sweep.grid import Prompt as Prompt
from mrflow.sweep.grid import Sweep as Sweep
from mrflow.sweep.local import Maker as Maker
from mrflow.sweep.local import Progress as Progress
from mrflow.sweep.local import Summary as Summary
from mrflow.sweep.local import run_sweep as run_sweep
from mrflow.sweep.metrics import ClipScore as ClipScore
from mrflow.sweep.metrics import Lpips as Lpips
from mrflow.sweep.metrics import Measured as Measured
from mrflow.sweep.metrics import Metric as Metric
from mrflow.sweep.metrics import Psnr as Psnr
from mrflow.sweep.metrics import ReadText as ReadText
from mrflow.sweep.metrics import RoundTrip as RoundTrip
from mrflow.sweep.metrics import SceneScore as SceneScore
from mrflow.sweep.metrics import Sharpness as Sharpness
from mrflow.sweep.metrics import Spectrum as Spectrum
from mrflow.sweep.metrics import Ssim as Ssim
from mrflow.sweep.statistics import Comparison as Comparison
from mrflow.sweep.statistics import Interval as Interval
from mrflow.sweep.statistics import compare as compare
from mrflow.sweep.statistics import interval as interval
from mrflow.sweep.statistics import pareto as pareto
from mrflow.sweep.statistics import values as values
from mrflow.sweep.store import Row as Row
from mrflow.sweep.store import Store as Store
from mrflow.sweep.store import read as read
