"""What must pass both type checkers."""

import mrflow as mf
from mrflow.spec import Pixels, Start
from mrflow.stage import Chain

chain: Chain[Start, Pixels] = (
    mf.Sample(64, 64)
    >> mf.Decode()
    >> mf.Upscale(mf.Lanczos(2))
    >> mf.Encode()
    >> mf.Reinject(0.1)
    >> mf.Refine()
    >> mf.Decode()
)
solvers: list[mf.Solver] = [mf.Euler(), mf.Heun()]
model: mf.Backbone = mf.toy()
result: mf.Result = mf.run(chain, model, ["a"], seed=[1])
