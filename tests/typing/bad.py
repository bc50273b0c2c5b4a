"""What must fail both type checkers, on exactly the marked lines."""

import mrflow as mf

mf.Sample(64, 64) >> mf.Upscale()  # error
mf.Decode() >> mf.Reinject(0.1)  # error
mf.Sample(64, 64) >> mf.Decode() >> mf.Refine()  # error
mf.Sample("64", 64)  # error
mf.run(mf.Sample(64, 64), 3, "a")  # error
mf.Sample(64, 64) >> mf.Decode() >> mf.Encode()
